"""`RankGroup`: ranks that hold one model's virtual shards together, or its copies, and their collectives.

Sums have one shape at every degree: a balanced binary tree over the virtual shards, neighbours first. The tree's
lower levels lie inside a rank; its upper ones are a *butterfly*: at distance 1, 2, 4 … two ranks exchange what they
have and add. Both add the same two numbers, so all ranks end with the same bits, and with those of one rank alone.
A large sum is split on the way (halving, then doubling), which moves 2(n−1)/n of it instead of log₂ n times all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.errors import ConfigError
from headrace.parallel.links import Link
from headrace.parallel.traffic import Traffic

__all__ = ["DistributedGroup", "RankGroup"]

LARGE = 1 << 15
"""Elements from which a sum is split: for smaller ones fewer rounds matter more than fewer bytes."""


class RankGroup:
    """A group of one: every collective returns what it was given. The base of larger groups."""

    rank = 0
    size = 1
    device = torch.device("cpu")
    """Of its messages."""

    def __init__(self, sequence: bool = False) -> None:
        """`sequence`: the stream between blocks is split by rows, which are a multiple of the ranks."""
        self.traffic = Traffic()
        self.sequence = sequence

    @classmethod
    def of_size(cls, size: int, rank: int = 0) -> RankGroup:
        """Rank `rank` of a group of `size` that cannot communicate: for computing layouts."""
        group = cls()
        group.rank, group.size = rank, size
        return group

    def require_shards(self, shards: int) -> None:
        """Raise `ConfigError` unless every rank can hold as many of `shards` virtual shards."""
        if shards % self.size:
            raise ConfigError(
                f"tensor parallelism of {self.size} does not divide the model's {shards} virtual shards (the greatest "
                f"common divisor of virtual_shards and its attention heads): use {_divisors(shards)}"
            )

    def own(self, pieces: int, rank: int | None = None) -> range:
        """Which of `pieces` consecutive pieces a rank (None: this one) holds.

        With fewer pieces than ranks, several ranks hold the same one.
        """
        rank = self.rank if rank is None else rank
        if pieces >= self.size:
            each = pieces // self.size
            return range(rank * each, (rank + 1) * each)
        first = rank * pieces // self.size
        return range(first, first + 1)

    def all_reduce(self, x: Tensor, purpose: str, width: int | None = None) -> Tensor:
        """The sum over the ranks, or over each run of `width` consecutive ranks. May return x itself, changed."""
        return x

    def reduce_scatter(self, x_TD: Tensor, purpose: str) -> Tensor:
        """This rank's rows of the sum over the ranks: rank i gets the i-th of equal parts."""
        return x_TD

    def all_gather(self, x_RD: Tensor, purpose: str) -> Tensor:
        """All ranks' rows, in rank order; every rank has as many."""
        return x_RD

    def all_gather_uneven(self, x_N: Tensor, purpose: str) -> Tensor:
        """All ranks' numbers, in rank order; ranks may have different counts, which are gathered first."""
        if self.size == 1:
            return x_N
        counts = self.all_gather(torch.tensor([len(x_N)], device=self.device), purpose).tolist()
        if not max(counts):
            return x_N
        padded = torch.zeros(max(counts), dtype=x_N.dtype, device=self.device)
        padded[: len(x_N)] = x_N
        parts = self.all_gather(padded, purpose).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts)]).to(x_N.device)

    @property
    def slot(self) -> int:
        """Which of a divided tensor's `size` slots this rank has: its number's bits in reverse.

        So the halves that `sum_slots_` sends, to the nearest rank first, are always runs of slots.
        """
        return int(format(self.rank, f"0{self.size.bit_length() - 1}b")[::-1], 2) if self.size > 1 else 0

    def sum_slots_(self, flat: Tensor, cuts: Sequence[int], purpose: str) -> None:
        """Reduce-scatter in place: this rank's slot of `flat`, flat[cuts[slot] : cuts[slot + 1]], becomes the sum
        over the ranks. The rest of it is undefined."""

    def gather_slots_(self, flat: Tensor, cuts: Sequence[int], purpose: str) -> None:
        """All-gather in place: every rank sends its slot of `flat` and receives the others."""

    def all_reduce_slots_(self, flat: Tensor, cuts: Sequence[int], purpose: str) -> None:
        """All-reduce in place, with the sums of `sum_slots_`."""

    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]], purpose: str) -> list[Tensor] | None:
        """On rank 0 every rank's tensor, rank i's of `shapes[i]`, in rank order; None elsewhere."""
        return [x]

    def gather_columns(self, x_RV: Tensor, widths: Sequence[int], purpose: str) -> Tensor:
        """On rank 0, all ranks' columns side by side, rank i's having `widths[i]`; elsewhere x as it is."""
        parts = self.gather(x_RV, [(len(x_RV), width) for width in widths], purpose)
        return x_RV if parts is None else parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's `data`, on every rank."""
        assert data is not None
        return data

    def barrier(self) -> None:
        """Wait for every rank."""

    def close(self) -> None:
        """Leave the group."""


def _divisors(shards: int) -> str:
    return " or ".join(str(n) for n in (1, 2, 4, 8, 16) if shards % n == 0)


class DistributedGroup(RankGroup):
    """Ranks that communicate over a link."""

    def __init__(self, link: Link, rank: int, size: int, sequence: bool = False) -> None:
        """`size` is a power of two."""
        super().__init__(sequence)
        if size & (size - 1):
            raise ConfigError(f"tensor parallelism of {size} is not a power of two")
        self._link = link
        self.device = link.device
        self.rank, self.size = rank, size

    def all_reduce(self, x: Tensor, purpose: str, width: int | None = None) -> Tensor:
        width = self.size if width is None else width
        began = time.perf_counter()
        self.traffic.count("all_reduce", purpose, x.numel())
        x = x.contiguous()
        if x.numel() < LARGE or width == 2:
            distance = 1
            while distance < width:
                x = x + self._exchange(x, torch.empty_like(x), self.rank ^ distance)
                distance *= 2
        else:
            flat = x.view(-1)
            cuts = [i * flat.numel() // width for i in range(width + 1)]
            chunks = [flat[a:b] for a, b in zip(cuts, cuts[1:])]
            own = self._scatter(chunks, width)
            x = self._gather(own, [c.numel() for c in chunks], width).view(x.shape)
        self.traffic.seconds += time.perf_counter() - began
        return x

    def reduce_scatter(self, x_TD: Tensor, purpose: str) -> Tensor:
        began = time.perf_counter()
        self.traffic.count("reduce_scatter", purpose, x_TD.numel())
        own_RD = self._scatter(x_TD.contiguous().split(len(x_TD) // self.size), self.size)
        self.traffic.seconds += time.perf_counter() - began
        return own_RD

    def all_gather(self, x_RD: Tensor, purpose: str) -> Tensor:
        began = time.perf_counter()
        self.traffic.count("all_gather", purpose, self.size * x_RD.numel())
        flat = self._gather(x_RD.reshape(-1), [x_RD.numel()] * self.size, self.size)
        self.traffic.seconds += time.perf_counter() - began
        return flat.view(self.size * len(x_RD), *x_RD.shape[1:])

    def sum_slots_(self, flat: Tensor, cuts: Sequence[int], purpose: str) -> None:
        began = time.perf_counter()
        self.traffic.count("reduce_scatter", purpose, cuts[-1] - cuts[0])
        self._sum_slots(flat, cuts)
        self.traffic.seconds += time.perf_counter() - began

    def gather_slots_(self, flat: Tensor, cuts: Sequence[int], purpose: str) -> None:
        began = time.perf_counter()
        self.traffic.count("all_gather", purpose, cuts[-1] - cuts[0])
        self._gather_slots(flat, cuts)
        self.traffic.seconds += time.perf_counter() - began

    def all_reduce_slots_(self, flat: Tensor, cuts: Sequence[int], purpose: str) -> None:
        began = time.perf_counter()
        self.traffic.count("all_reduce", purpose, cuts[-1] - cuts[0])
        self._sum_slots(flat, cuts)
        self._gather_slots(flat, cuts)
        self.traffic.seconds += time.perf_counter() - began

    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]], purpose: str) -> list[Tensor] | None:
        began = time.perf_counter()
        self.traffic.count("gather", purpose, sum(math.prod(shape) for shape in shapes))
        parts = None
        if self.rank:
            if x.numel():
                self._sent(x)
                self._link.send(x.contiguous(), 0)
        else:
            parts = [x, *(x.new_empty(tuple(shape)) for shape in shapes[1:])]
            for source, part in enumerate(parts):
                if source and part.numel():
                    self._link.receive(part, source)
        self.traffic.seconds += time.perf_counter() - began
        return parts

    def broadcast(self, data: bytes | None) -> bytes:
        if self.rank == 0:
            assert data is not None
            for rank in range(1, self.size):
                self._link.send(torch.tensor([len(data)], device=self.device), rank)
                if data:
                    self._link.send(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device), rank)
            return data
        length = torch.empty(1, dtype=torch.int64, device=self.device)
        self._link.receive(length, 0)
        received = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if len(received):
            self._link.receive(received, 0)
        return received.cpu().numpy().tobytes()

    def barrier(self) -> None:
        distance = 1
        while distance < self.size:
            ours, theirs = torch.zeros(1, device=self.device), torch.empty(1, device=self.device)
            self._link.exchange(ours, theirs, self.rank ^ distance)
            distance *= 2

    def close(self) -> None:
        self._link.close()

    # ---- the butterfly

    def _scatter(self, chunks: Sequence[Tensor], width: int) -> Tensor:
        """Recursive halving: at each distance half of the rest is sent to the partner, and the other half summed."""
        base = self.rank // width * width
        mine = dict(enumerate(chunks))
        distance = 1
        while distance < width:
            keep = [i for i in mine if not (i ^ (self.rank - base)) & distance]
            give = torch.cat([mine[i] for i in mine if i not in keep])
            kept = torch.cat([mine[i] for i in keep])
            total = kept + self._exchange(give, torch.empty_like(kept), self.rank ^ distance)
            mine = dict(zip(keep, total.split([len(mine[i]) for i in keep])))
            distance *= 2
        return mine[self.rank - base]

    def _gather(self, own: Tensor, sizes: Sequence[int], width: int) -> Tensor:
        """Recursive doubling: the steps of `_scatter` in reverse."""
        base = self.rank // width * width
        mine = {self.rank - base: own}
        distance = width // 2
        while distance:
            theirs = sorted(i ^ distance for i in mine)
            give = torch.cat([mine[i] for i in sorted(mine)])
            got = self._exchange(give, own.new_empty(sum(sizes[i] for i in theirs)), self.rank ^ distance)
            mine |= dict(zip(theirs, got.split([sizes[i] for i in theirs])))
            distance //= 2
        return torch.cat([mine[i] for i in sorted(mine)])

    def _sum_slots(self, flat: Tensor, cuts: Sequence[int]) -> None:
        """Halving, neighbours first: of the run of slots that is left, a rank keeps the half that holds its own."""
        for distance, (low, middle, high) in self._halves():
            keep, give = (low, middle), (middle, high)
            if self.rank & distance:
                keep, give = give, keep
            kept = flat[cuts[keep[0]] : cuts[keep[1]]]
            kept.add_(self._exchange(flat[cuts[give[0]] : cuts[give[1]]], torch.empty_like(kept), self.rank ^ distance))

    def _gather_slots(self, flat: Tensor, cuts: Sequence[int]) -> None:
        """Doubling: the steps of `_sum_slots` in reverse."""
        for distance, (low, middle, high) in reversed(self._halves()):
            have, lack = (low, middle), (middle, high)
            if self.rank & distance:
                have, lack = lack, have
            self._exchange(
                flat[cuts[have[0]] : cuts[have[1]]], flat[cuts[lack[0]] : cuts[lack[1]]], self.rank ^ distance
            )

    def _halves(self) -> list[tuple[int, tuple[int, int, int]]]:
        """(distance, (first, middle, end) of the run of slots that is halved there), neighbours first."""
        found, low, high, distance = [], 0, self.size, 1
        while distance < self.size:
            middle = (low + high) // 2
            found.append((distance, (low, middle, high)))
            low, high = (middle, high) if self.rank & distance else (low, middle)
            distance *= 2
        return found

    def _exchange(self, give: Tensor, take: Tensor, partner: int) -> Tensor:
        self._sent(give)
        self._link.exchange(give, take, partner)
        return take

    def _sent(self, x: Tensor) -> None:
        self.traffic.bytes_sent += x.numel() * x.element_size()
