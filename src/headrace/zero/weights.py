"""Parameters divided over the copies of a model: stored, gathered for use, released (ZeRO §5.3).

Up to stage 2 every copy holds all weights, and its optimizer updates a slot of each bucket. At stage 3 a rank stores
only that slot of a matrix. Before a part of the model is used, its unit is gathered into a buffer, while the next unit
is prefetched; afterwards another unit reuses the buffer. Vectors are always whole, as they are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from statistics import mode

import torch
from torch import Tensor, nn

from headrace.parallel.group import RankGroup
from headrace.zero.collectives import CollectiveQueue
from headrace.zero.layout import Unit
from headrace.zero.memory import Arena

__all__ = ["Weights"]


class Weights:
    """The parameters of one rank, unit by unit."""

    def __init__(
        self,
        units: Sequence[Unit],
        parameters: Sequence[nn.Parameter],
        copies: RankGroup,
        stage: int,
        queue: CollectiveQueue,
    ) -> None:
        """Allocates the parameters' memory. Those that stay whole keep their values; divided ones lose them."""
        self._units, self._parameters = list(units), parameters
        self._copies, self._stage, self._queue = copies, stage, queue
        self._divided = [stage == 3 and unit.matrices for unit in units]
        device = parameters[0].device
        sizes = [unit.size for unit, divided in zip(units, self._divided) if divided]
        self._arenas = {
            (unit.size, unit.dtype): Arena(unit.size, unit.dtype, device)
            for unit, divided in zip(units, self._divided)
            if divided
        }
        self._usual = mode(sizes) if sizes else 0
        self._stored = []
        """For each unit: all of it, or this rank's slots one after another."""
        self._gathered: dict[int, Tensor] = {}
        """Buffers of the divided units that are whole or being gathered."""
        self._running: dict[int, Future[None]] = {}
        self._uses = [0] * len(self._units)
        for parameter in parameters:
            if not parameter.numel():  # of an empty vocabulary shard, which is in no unit
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        for i, unit in enumerate(units):
            size = sum(b - a for a, b in unit.slots(copies.slot)) if self._divided[i] else unit.size
            self._stored.append(torch.empty(size, dtype=unit.dtype, device=device))
            if self._divided[i]:
                self._unbind(i)
            else:
                values = [parameters[member.parameter].detach() for member in unit.members]
                self._bind(i, self._stored[i])
                for member, value in zip(unit.members, values):
                    parameters[member.parameter].detach().copy_(value)

    # ---- what this rank keeps

    def own(self) -> Iterator[tuple[Unit, int, Tensor]]:
        """(unit, offset, weights from that offset) of every slot that this rank's optimizer updates."""
        for i, unit in enumerate(self._units):
            at, stored = 0, self._stored[i]
            if self._stage == 0:
                yield unit, 0, stored
                continue
            for a, b in unit.slots(self._copies.slot):
                yield unit, a, stored[at : at + b - a] if self._divided[i] else stored[a:b]
                at += b - a

    def publish(self) -> None:
        """After the optimizer's step: all-gather the units that every copy holds whole."""
        for i, unit in enumerate(self._units):
            if self._stage and not self._divided[i]:
                for cuts in unit.buckets:
                    self._queue.submit(partial(self._copies.gather_slots_, self._stored[i], cuts, "weights"))
        self._queue.drain()

    def tensors(self) -> list[Tensor]:
        """All weight memory that stays."""
        return self._stored

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers in which units are gathered."""
        return sum(arena.nbytes for arena in self._arenas.values())

    # ---- gather and release

    def gather(self, unit: int, following: int | None = None) -> None:
        """Wait until `unit` is whole, and prefetch `following`. Nests; `release` undoes it."""
        self._uses[unit] += 1
        if self._divided[unit]:
            self._begin(unit)
            gather = self._running.pop(unit, None)
            if gather is not None:
                self._queue.wait(gather)
            if self._uses[unit] == 1:
                self._bind(unit, self._gathered[unit])
        if following is not None and self._divided[following]:
            self._begin(following)

    def release(self, unit: int) -> None:
        """Release a unit; its last user frees the buffer."""
        self._uses[unit] -= 1
        if self._divided[unit] and not self._uses[unit]:
            self._unbind(unit)
            self._free(unit)

    @contextmanager
    def filling(self, unit: int) -> Iterator[None]:
        """A context in which the caller writes all of a unit, the same on all ranks; afterwards only the slots stay."""
        if not self._divided[unit]:
            yield
            return
        buffer = self._gathered[unit] = self._arena(unit).take()
        self._bind(unit, buffer)
        yield
        at, stored = 0, self._stored[unit]
        for a, b in self._units[unit].slots(self._copies.slot):
            stored[at : at + b - a] = buffer[a:b]
            at += b - a
        self._unbind(unit)
        self._free(unit)

    def _begin(self, unit: int) -> None:
        if unit in self._gathered:
            return
        buffer = self._gathered[unit] = self._arena(unit).take()
        self._running[unit] = self._queue.submit(partial(self._gather, unit, buffer))

    @torch.no_grad()
    def _gather(self, unit: int, buffer: Tensor) -> None:
        at, stored = 0, self._stored[unit]
        slot = self._copies.slot
        for cuts in self._units[unit].buckets:
            a, b = cuts[slot], cuts[slot + 1]
            buffer[a:b] = stored[at : at + b - a]
            at += b - a
            self._copies.gather_slots_(buffer, cuts, "weights")

    def _free(self, unit: int) -> None:
        """Keep the blocks' buffers, of which two are in use at a time; free the embedding's, which is used rarely."""
        arena, buffer = self._arena(unit), self._gathered.pop(unit)
        if self._units[unit].size == self._usual:
            arena.put_back(buffer)
        else:
            arena.count -= 1

    def _arena(self, unit: int) -> Arena:
        return self._arenas[self._units[unit].size, self._units[unit].dtype]

    def _bind(self, unit: int, flat: Tensor) -> None:
        """Make the parameters views of `flat`. Autograd saved the same objects, so it sees the values too."""
        for member in self._units[unit].members:
            parameter = self._parameters[member.parameter]
            parameter.data = flat[member.offset : member.stop].view(parameter.shape)

    def _unbind(self, unit: int) -> None:
        """Drop the parameters' memory and keep their shapes."""
        one = torch.empty(1, dtype=self._units[unit].dtype, device=self._stored[unit].device)
        for member in self._units[unit].members:
            parameter = self._parameters[member.parameter]
            parameter.data = one.expand(parameter.shape)
