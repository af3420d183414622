"""Whether forced tokens are computed together with the next sampled one, or one a step."""

from headrace.engine.schedule import pool
from headrace.engine.schedule.slices import make_slice
from invariance.axis import Axis, Mutant, Setup


def setup(setup: Setup, jump: str) -> None:
    setup.options["jump_forward"] = jump


def leaves_out_a_forced_token(patch):
    """Forced tokens of which the KV that is stored is another token's."""

    def changed(request, start, end, samples, edits):
        made = make_slice(request, start, end, samples, edits)
        if request.forced_apart and start >= request.num_prompt_tokens and not samples:
            made.token_ids = [0] * len(made.token_ids)
        return made

    patch.setattr(pool, "make_slice", changed)


AXIS = Axis(
    values=("together", "stepwise"),
    setup=setup,
    mutants=(Mutant(leaves_out_a_forced_token, load=2, constraint="json", jump="stepwise"),),
)
