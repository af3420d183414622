"""Stall-free batching with chunked prefill (Sarathi-Serve §4): no running request waits behind a prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["TILE", "Sarathi"]

TILE = 64
"""Where a prompt is cut, the step's tokens are a multiple of this (SARATHI: 257 cost more than 256)."""


class Sarathi:
    """Every decode first; what is left of the token budget goes to prompts, in chunks, in policy order.

    At most `budget` requests run, so one prompt token is always left for the first prompt behind the decodes.
    """

    joins_empty = False

    def __init__(self, budget: int, max_num_seqs: int) -> None:
        self.budget = budget
        self.seats = min(max_num_seqs, budget)
        self._spare = budget % TILE if budget > TILE else 0
        self._left = budget

    def share(self, remaining: Sequence[int], following: Sequence[int]) -> list[int]:
        left = self.budget - sum(remaining)
        if left >= 0:  # the common step: every request gets all it can use
            self._left = left
            return list(remaining)
        granted = [0] * len(remaining)
        left = self.budget
        waiting = sum(1 for count in remaining if count)
        for i, count in enumerate(remaining):
            if 0 < count <= 1 + following[i]:
                waiting -= 1
                granted[i] = min(count, max(1, left - waiting))
                left -= granted[i]
        self._left = left
        for i, count in enumerate(remaining):
            if count > 1 + following[i] and self._left > 0:
                granted[i] = self.first(count)
                self.take(granted[i])
        return granted

    def admits(self, group_id: int, running_groups: Collection[int]) -> bool:
        return self._left > 0

    def first(self, remaining: int) -> int:
        left = self._left
        if remaining <= left:
            return remaining
        return left - self._spare if left > self._spare else left

    @property
    def spare(self) -> int:
        return max(self._left, 0)

    def take(self, tokens: int) -> None:
        self._left -= tokens
        if self._left == self._spare:  # keep the step a whole number of tiles
            self._left = 0
