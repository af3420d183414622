"""Request-level batching, the baseline of the Orca paper: a batch enters together and leaves together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from headrace.engine.schedule.batching.orca import Orca

__all__ = ["Static"]


class Static(Orca):
    """No request joins until every request of the batch has finished.

    The batch is every request that can be admitted in a step in which none runs; its prompts then run whole,
    over as many steps as the token budget needs. Other choices of a running prompt belong to its batch.
    """

    joins_empty = True

    def __init__(self, budget: int, max_num_seqs: int) -> None:
        super().__init__(budget, max_num_seqs)
        self._open = True

    def share(self, remaining: Sequence[int], following: Sequence[int]) -> list[int]:
        self._open = not remaining
        return super().share(remaining, following)

    def admits(self, group_id: int, running_groups: Collection[int]) -> bool:
        return self._open or group_id in running_groups
