"""Iteration-level batching (Orca §3): requests join and leave between any steps; prompts are never cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["Orca"]


class Orca:
    """Every running request takes all it can, so a long prompt stalls the decodes beside it.

    The token budget only says how many prompts may share a step: the first one of a step always runs, whole,
    however long it is.
    """

    joins_empty = False

    def __init__(self, budget: int, max_num_seqs: int) -> None:
        self.budget = budget
        self.seats = max_num_seqs
        self._left = budget
        self._prompts = 0

    def share(self, remaining: Sequence[int], following: Sequence[int]) -> list[int]:
        self._left = self.budget
        self._prompts = 0
        granted = [count if count <= 1 + following[i] else 0 for i, count in enumerate(remaining)]
        self._left -= sum(granted)
        for i, count in enumerate(remaining):
            if count > 1 + following[i]:
                granted[i] = self.first(count)
                self.take(granted[i])
        return granted

    def admits(self, group_id: int, running_groups: Collection[int]) -> bool:
        return True

    def first(self, remaining: int) -> int:
        return remaining if remaining <= self._left or self._prompts == 0 else 0

    @property
    def spare(self) -> int:
        return max(self._left, 0)

    def take(self, tokens: int) -> None:
        self._left -= tokens
        self._prompts += tokens > 0
