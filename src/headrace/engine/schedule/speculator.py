"""`Speculator`: the protocol through which the scheduler gets drafts. The room `speculate` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.cache.manager import BlockMoves
from headrace.engine.schedule.request import Request

__all__ = ["Candidate", "Speculator", "common_prefix"]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens, from the first on, two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that may get drafts in this step: the step computes its last known token and samples the next one."""

    request: Request
    """To be read: all its known tokens have KV once this step has run."""
    most: int
    """Drafts that it has room for: in its output, its reservation and the free blocks. At least 1."""


class Speculator(Protocol):
    """Chooses how many tokens to draft, and drafts them (2211.17192 §2). The scheduler's thread calls it.

    Every step: `choose`, then `propose`, then `began`. Its result: `ended`, then `learn` and `waits` for each request
    with a sampled token. Calls of two steps in flight interleave, in the order of the steps.
    """

    def wants(self, request: Request) -> bool:
        """Whether it may draft for this request: the same answer as long as the request lives.

        While it wants none, no tokens are learned and nothing is chosen.
        """
        ...

    def choose(self, candidates: Sequence[Candidate], rows: int, spare: int) -> list[int]:
        """Tokens to draft for each candidate, from 0 to its `most`, at most `spare` together.

        The step computes `rows` tokens without them.
        """
        ...

    def propose(self, candidates: Sequence[Candidate], counts: Sequence[int], moves: BlockMoves) -> list[list[int]]:
        """The drafts of each candidate that got any: at most `counts[i]` tokens. `request.kv.blocks` has their blocks.

        `moves` are the step's, which a store of its own must do first; it is called where nobody drafts, too.
        """
        ...

    def began(self, rows: int) -> None:
        """A step of `rows` tokens, drafts included, goes to the executor now."""
        ...

    def learn(self, request: Request, drafts: Sequence[int], accepted: int) -> None:
        """`request` has new tokens at its end; of the step's `drafts` for it, the first `accepted` are among them."""
        ...

    def waits(self, request: Request) -> bool:
        """Whether no step may be planned for this request until its next token is known, so that drafts may follow it.

        With one step in flight that is so anyhow. A new request that it wants waits.
        """
        ...

    def ended(self, rows: int) -> None:
        """The oldest step in flight, of `rows` tokens, has its result."""
        ...

    def finish(self, request: Request) -> None:
        """The request has ended, with these tokens."""
        ...
