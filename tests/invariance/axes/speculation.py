"""Who drafts tokens that one step verifies together; γ is random for each request and step."""

import random
from collections.abc import Sequence

from headrace.engine.schedule.edits import EditState
from headrace.engine.schedule.pool import RequestPool
from headrace.grammar.mask import GrammarMask
from headrace.kernels.ops import SampleParams
from headrace.speculate.base import Offer, Proposal
from headrace.speculate.ngram import NgramProposer
from headrace.speculate.suffix import SuffixProposer
from invariance.axis import Axis, Mutant, Setup


class RandomGamma:
    """Any γ that the offers allow, 0 included."""

    def __init__(self) -> None:
        self._draw = random.Random(4)

    def choose(self, offers: Sequence[Offer], rows: int, spare: int) -> list[int]:
        counts = []
        for offer in offers:
            counts.append(min(self._draw.choice((0, 1, 2, 3, 5)), offer.most, spare))
            spare -= counts[-1]
        return counts

    def learn(self, offer, right, wrong) -> None: ...
    def waits(self) -> bool:
        return self._draw.random() < 0.8

    def passed(self, rows, seconds) -> None: ...
    def began(self, rows) -> None: ...
    def ended(self, rows) -> None: ...
    def finish(self, request_id) -> None: ...


class RandomProposer:
    """Tokens of the request itself, in any order."""

    name = "random"

    def __init__(self) -> None:
        self._draw = random.Random(7)

    def wants(self, request) -> bool:
        return True

    def propose(self, request, most) -> Proposal:
        return Proposal(self._draw.choices(request.token_ids, k=self._draw.randrange(most + 1)))

    def learn(self, request) -> None: ...
    def finish(self, request) -> None: ...


PROPOSERS = {"ngram": NgramProposer, "suffix": SuffixProposer, "random": RandomProposer}


def setup(setup: Setup, speculation: str) -> None:
    if speculation == "off":
        return
    setup.gamma = RandomGamma()
    setup.draft = speculation == "draft"
    setup.proposers = [] if setup.draft else [PROPOSERS[speculation]()]


def accepts_blindly(patch):
    """Every draft counts as if the model had chosen it."""
    right = RequestPool._absorb

    def absorb(self, request, sampled, drafts):
        return right(self, request, [*drafts, *sampled[len(drafts) :]], drafts)

    patch.setattr(RequestPool, "_absorb", absorb)


def edits_ignore_drafts(patch):
    """Penalties that do not count the drafts before a row."""
    patch.setattr(EditState, "behind", lambda self, count, drafts: [self.fork().current(count)] * len(drafts))


def noise_of_the_step(patch):
    """One noise for all rows of a slice."""
    right = SampleParams.__init__

    def init(self, *args, **columns):
        right(self, *args, **columns)
        position, seed = self.position_R, self.seed_R
        for row in range(1, len(position)):
            if seed[row] == seed[row - 1] and position[row] == position[row - 1] + 1:
                position[row] = position[row - 1]

    patch.setattr(SampleParams, "__init__", init)


def does_not_fork_a_mask(patch):
    """A mask that stays behind the drafts of a step."""
    patch.setattr(GrammarMask, "fork", lambda self: self)


AXIS = Axis(
    values=("off", "ngram", "suffix", "draft", "random"),
    setup=setup,
    mutants=(
        Mutant(accepts_blindly, load=16, speculation="random"),
        Mutant(edits_ignore_drafts, load=16, sampling="penalised", speculation="draft"),
        Mutant(noise_of_the_step, load=2, sampling="seeded", speculation="draft"),
        Mutant(does_not_fork_a_mask, load=16, constraint="regex", speculation="draft"),
    ),
)
