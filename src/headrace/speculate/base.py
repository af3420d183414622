"""What the parts of speculation ask of each other: proposers of drafts, and the policy of how many to use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from headrace.engine.schedule.request import Request

__all__ = ["DRAFT", "LONGEST", "Gamma", "Offer", "Proposal", "Proposer"]

DRAFT = "draft"
"""The proposer in an offer of the draft model, whose drafts cost time and exist only where they were asked for."""
LONGEST = 16
"""Most drafts of one request in a step: more rows cost more than even copied text brings."""


class Proposal(NamedTuple):
    """Tokens that may follow a request's known ones, and how many tokens before them led to it."""

    token_ids: list[int]
    match: int = 0


class Proposer(Protocol):
    """Proposes drafts from tokens alone, on the scheduler's thread: microseconds, not milliseconds."""

    name: str

    def wants(self, request: Request) -> bool:
        """Whether it may propose for this request: the same answer as long as the request lives."""
        ...

    def propose(self, request: Request, most: int) -> Proposal:
        """At most `most` tokens; an empty proposal where it has none. Changes nothing that others can see."""
        ...

    def learn(self, request: Request) -> None:
        """The request has new tokens at its end (or is new here)."""
        ...

    def finish(self, request: Request) -> None:
        """The request has ended: forget what was kept for it alone."""
        ...


class Offer(NamedTuple):
    """A proposal as γ's policy sees it."""

    request_id: int
    proposer: str
    match: int
    most: int
    """Tokens proposed: γ is from 0 to this."""
    behind: int = 0
    """Known tokens that a draft model must compute before it drafts; 0 of other proposers."""


class Gamma(Protocol):
    """How many drafts each request gets in a step. Its clock is injected."""

    def choose(self, offers: Sequence[Offer], rows: int, spare: int) -> list[int]:
        """γ for each offer, at most `spare` together. The step computes `rows` tokens without them."""
        ...

    def learn(self, offer: Offer, right: int, wrong: bool) -> None:
        """Of an offer's tokens, drafted or not, the first `right` were what came; `wrong`: the next one was not.

        Without `wrong` nothing is known of the next one.
        """
        ...

    def waits(self) -> bool:
        """Whether requests should wait for their next token, as γ may not be 0 then."""
        ...

    def passed(self, rows: int, seconds: float) -> None:
        """A pass of the draft model that computed so many tokens took so long."""
        ...

    def began(self, rows: int) -> None:
        """A step of `rows` tokens goes to the executor now."""
        ...

    def ended(self, rows: int) -> None:
        """The oldest step in flight, of `rows` tokens, has its result."""
        ...

    def finish(self, request_id: int) -> None:
        """The request has ended."""
        ...
