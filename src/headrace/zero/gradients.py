"""Gradients: from backward into buckets, and, summed over the copies of the model, into slots.

A hook copies every parameter's gradient into its buckets as soon as it is made; a full bucket is reduced while backward
goes on (ZeRO §5.2). Stages 0 and 1 have memory for all gradients; from stage 2 on a bucket's buffer is reused as soon
as this rank's slot has been copied out of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from headrace.parallel.group import RankGroup
from headrace.zero.collectives import CollectiveQueue
from headrace.zero.layout import Unit
from headrace.zero.memory import Arena

__all__ = ["IN_FLIGHT", "Gradients"]

IN_FLIGHT = 2
"""Buckets that may wait to be reduced: more would take more memory without gain, as a link carries one at a time."""


@dataclass(slots=True)
class _Bucket:
    unit: Unit
    cuts: tuple[int, ...]
    own: Tensor
    """This rank's slot of the sum; at stage 0 the whole bucket."""
    lacks: int = 0
    """Elements whose gradient backward has not made yet."""
    buffer: Tensor | None = None
    """Where its gradients are collected; may be longer than the bucket, where it comes from an arena."""

    @property
    def start(self) -> int:
        return self.cuts[0]

    @property
    def size(self) -> int:
        return self.cuts[-1] - self.cuts[0]


class Gradients:
    """The gradients of one rank. `backward` computes them; `own` returns the slots of the sum that this rank keeps."""

    def __init__(
        self,
        units: Sequence[Unit],
        parameters: Sequence[nn.Parameter],
        copies: RankGroup,
        stage: int,
        queue: CollectiveQueue,
        each_micro_step: bool = True,
    ) -> None:
        """`each_micro_step` False: sum over the micro-steps here, and over the copies once, in the last of them."""
        self._copies, self._stage, self._queue = copies, stage, queue
        self._each = each_micro_step
        self._device = parameters[0].device
        self._arenas: dict[torch.dtype, Arena] = {}
        self._kept: list[tuple[Unit, Tensor]] = []
        self._buckets = [bucket for unit in _backwards(units) for bucket in self._of_unit(unit)]
        self._of_parameter: dict[int, list[_Bucket]] = {}
        for unit in units:
            for member in unit.members:
                self._of_parameter[member.parameter] = [
                    bucket
                    for bucket in self._buckets
                    if bucket.unit is unit and bucket.start < member.stop and bucket.cuts[-1] > member.offset
                ]
                parameter = parameters[member.parameter]
                parameter.register_post_accumulate_grad_hook(
                    partial(self._arrived, unit, member.offset, member.parameter)
                )
        self._next = 0
        self._taken = self._adds = False
        self._reduces = True

    def backward(self, loss: Tensor, first: bool = True, last: bool = True) -> None:
        """Compute the gradients of `loss` and sum them over the copies. A collective; `own` is then complete.

        `first`, `last`: the first and last of the micro-steps that are summed here (`each_micro_step` False).
        """
        self._adds = not first and not self._each
        self._reduces = last or self._each
        self._next = 0
        for bucket in self._buckets:
            bucket.lacks = bucket.size
        self._taken = True
        loss.backward()
        self._taken = False
        self._queue.drain()
        assert not any(bucket.lacks for bucket in self._buckets), "a parameter had no gradient"

    def own(self) -> dict[tuple[str, int], Tensor]:
        """{(unit, offset): this rank's gradients from that offset}. `backward` overwrites them."""
        if self._stage == 0:
            return {(unit.name, 0): kept for unit, kept in self._kept}
        slot = self._copies.slot
        return {(bucket.unit.name, bucket.cuts[slot]): bucket.own for bucket in self._buckets}

    def tensors(self) -> list[Tensor]:
        """All gradient memory that stays."""
        return [kept for _, kept in self._kept]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buckets' reusable buffers."""
        return sum(arena.nbytes for arena in self._arenas.values())

    # ---- inside

    def _of_unit(self, unit: Unit) -> Iterator[_Bucket]:
        """A unit's buckets, the last first, as backward reaches its end before its beginning."""
        slots = unit.slots(self._copies.slot)
        whole = self._stage < 2
        room = unit.size if whole else sum(b - a for a, b in slots)
        kept = torch.empty(room, dtype=unit.dtype, device=self._device)
        self._kept.append((unit, kept))
        at = 0
        made = []
        for cuts, (a, b) in zip(unit.buckets, slots):
            own = kept[cuts[0] : cuts[-1]] if self._stage == 0 else kept[a:b] if whole else kept[at : at + b - a]
            at += b - a
            made.append(_Bucket(unit, cuts, own, buffer=kept[cuts[0] : cuts[-1]] if whole else None))
        if not whole:
            arena = self._arenas.get(unit.dtype)
            longest = max(cuts[-1] - cuts[0] for cuts in unit.buckets)
            if arena is None or arena.elements < longest:
                self._arenas[unit.dtype] = Arena(longest, unit.dtype, self._device)
        return reversed(made)

    def _arrived(self, unit: Unit, offset: int, number: int, parameter: Tensor) -> None:
        """Hook: copy a parameter's gradient into its buckets, and queue the reduction of full ones."""
        if not self._taken:  # a backward that is not ours: leave the gradient in `parameter.grad`
            return
        grad = parameter.grad
        assert grad is not None
        flat = grad.reshape(-1)
        parameter.grad = None
        with torch.no_grad():
            for bucket in self._of_parameter[number]:
                low, high = max(bucket.start, offset), min(bucket.cuts[-1], offset + flat.numel())
                into = self._room(bucket)[low - bucket.start : high - bucket.start]
                part = flat[low - offset : high - offset]
                into.add_(part) if self._adds else into.copy_(part)
                bucket.lacks -= high - low
        while self._next < len(self._buckets) and not self._buckets[self._next].lacks:
            if self._reduces:
                self._queue.submit(partial(self._reduce, self._buckets[self._next]))
            self._next += 1

    def _room(self, bucket: _Bucket) -> Tensor:
        if bucket.buffer is None:
            self._queue.wait_until(IN_FLIGHT)
            bucket.buffer = self._arenas[bucket.unit.dtype].take()
        return bucket.buffer

    @torch.no_grad()
    def _reduce(self, bucket: _Bucket) -> None:
        buffer = bucket.buffer
        assert buffer is not None
        cuts = [cut - bucket.start for cut in bucket.cuts]  # relative to the buffer's beginning
        if self._stage == 0:
            self._copies.all_reduce_slots_(buffer, cuts, "gradients")
            return
        self._copies.sum_slots_(buffer, cuts, "gradients")
        if self._stage >= 2:
            slot = self._copies.slot
            bucket.own.copy_(buffer[cuts[slot] : cuts[slot + 1]])
            bucket.buffer = None
            self._arenas[bucket.unit.dtype].put_back(buffer)


def _backwards(units: Sequence[Unit]) -> list[Unit]:
    """The order in which backward finishes them: last to first, then the vectors, which all layers have."""
    matrices = [unit for unit in units if unit.matrices]
    return [*reversed(matrices), *(unit for unit in units if not unit.matrices)]
