"""`Batching`: what the scheduler asks of a batching policy, in plain ints."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

__all__ = ["Batching"]


class Batching(Protocol):
    """Shares the tokens of a step. `remaining` is what each running request could compute, in order."""

    seats: int
    """Requests that may run at once."""
    joins_empty: bool
    """Whether a request may join in a step that has no tokens left for it."""

    def share(self, remaining: Sequence[int], following: Sequence[int]) -> list[int]:
        """Tokens granted to each running request; starts the step.

        `following[i]` of its tokens are forced ones, which a decode computes with the sampled one.
        """
        ...

    def admits(self, group_id: int, running_groups: Collection[int]) -> bool:
        """Whether a request of this group may join the running ones now."""
        ...

    def first(self, remaining: int) -> int:
        """Tokens for a request that joins in this step; 0 when it must wait for the next. Grants nothing."""
        ...

    @property
    def spare(self) -> int:
        """Tokens of the step that are left when every request has what it can use; 0 where a prompt was cut."""
        ...

    def take(self, tokens: int) -> None:
        """A joining request was granted `tokens`."""
        ...
