"""What the output must be: anything, JSON, or text of a regular expression without some words."""

from headrace.engine.run.masks import MaskFiller
from headrace.engine.schedule import pool
from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.mask import replay
from headrace.engine.schedule.pool import RequestPool
from headrace.engine.schedule.sampling import SamplingParams
from headrace.grammar.grammars import Grammars
from headrace.grammar.mask import GrammarMask
from invariance.axis import Axis, Mutant, Setup

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yes"]}, "b": {"type": "integer"}, "c": {"type": "string", "maxLength": 9}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ASKED = {
    "none": {},
    "json": {"constraint": Constraint.json_schema(SCHEMA), "logprobs": 0},
    "regex": {
        "constraint": Constraint.regex("[a-z]{3,8}[0-9]{2}, ab[c-f]{1,4} [a-z ]{3,40}!"),
        "bad_words": ("e", "th"),
    },
}


def setup(setup: Setup, constraint: str) -> None:
    setup.params |= ASKED[constraint]


def forgets_the_output(patch):
    """A matcher that begins anew where its request goes on elsewhere."""
    patch.setattr(pool, "replay", lambda of, output, jump: replay(of, [], jump))


def replays_after_a_preemption(patch):
    """A matcher that reads the known tokens again when its request has lost its blocks."""
    right = RequestPool.preempt

    def preempt(self, request, plan):
        right(self, request, plan)
        if request.mask is not None:
            request.mask.accept(request.output_token_ids)

    patch.setattr(RequestPool, "preempt", preempt)


def takes_the_next_row(patch):
    """Masks that are one row off."""
    right = MaskFiller.start

    def start(self, sampled):
        result = right(self, sampled)

        def rolled():
            found = result()
            return None if found is None else (found[0], found[1].roll(1, 0))

        return rolled

    patch.setattr(MaskFiller, "start", start)


def shares_a_matcher(patch):
    """One matcher for all outputs that begin together."""
    right, latest = Grammars.mask, list[GrammarMask]()

    def mask(self, params, stop_ids):
        if latest and not latest[0]._tokens:
            return latest[0]
        latest[:] = [right(self, params, stop_ids)]
        return latest[0]

    patch.setattr(Grammars, "mask", mask)


def is_one_token_old(patch):
    """Steps that are planned ahead of the result that their masks need."""
    patch.setattr(SamplingParams, "follows_output", False)


AXIS = Axis(
    values=tuple(ASKED),
    setup=setup,
    question=True,
    mutants=(
        Mutant(forgets_the_output, load=16, constraint="regex", resumed=True),
        Mutant(replays_after_a_preemption, load=16, constraint="regex", preemption="recompute"),
        Mutant(takes_the_next_row, load=16, constraint="regex"),
        Mutant(shares_a_matcher, load=16, constraint="regex", sampling="seeded"),
        Mutant(is_one_token_old, load=2, constraint="regex", depth=2),
    ),
)
