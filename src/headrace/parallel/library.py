"""Sums by the communication library: faster, but without the same bits."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from headrace.parallel.group import DistributedGroup
from headrace.parallel.links import ProcessGroupLink

__all__ = ["LibraryGroup"]


class LibraryGroup(DistributedGroup):
    """Ranks whose divided tensors are summed by gloo's or NCCL's own all-reduce.

    The order of its additions depends on the number of ranks and on the library's version, so another number of copies,
    or accumulation in their place, trains to other bits. Bytes sent are not counted: the library does not report them.
    """

    _link: ProcessGroupLink

    def sum_slots_(self, flat: Tensor, cuts: Sequence[int], purpose: str) -> None:
        self._library_sum(flat, cuts, "reduce_scatter", purpose)

    def all_reduce_slots_(self, flat: Tensor, cuts: Sequence[int], purpose: str) -> None:
        self._library_sum(flat, cuts, "all_reduce", purpose)

    def _library_sum(self, flat: Tensor, cuts: Sequence[int], collective: str, purpose: str) -> None:
        began = time.perf_counter()
        run = flat[cuts[0] : cuts[-1]]
        self.traffic.count(collective, purpose, run.numel())
        self._link.all_reduce(run)
        self.traffic.seconds += time.perf_counter() - began
