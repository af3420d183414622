"""Which elements of a model each copy keeps: plain numbers, without tensors.

A rank's parameters are laid end to end in *units*: the matrices of the embedding, of each block and of the head, and,
in one unit, all vectors. A unit is cut into *buckets* of about a constant size (ZeRO-R's C_B), a bucket into one *slot*
for each copy of the model. All cuts lie between *chunks*, the rows whose gradients' squares are summed together, so
that the norm does not depend on which rank keeps an element.

    parameter   a local weight, seen as [rows, width]; a vector as [elements, 1]
    place       the rectangle of a parameter that is (this rank's part of) one tensor of the checkpoint
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from headrace.config import ModelConfig
from headrace.kernels.autograd import AutogradOps
from headrace.kernels.training import TrainingOps
from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup
from headrace.parallel.pieces import Piece

__all__ = ["CHUNK", "Member", "Place", "RowRange", "Unit", "divide", "lay_out"]

CHUNK = 4096
"""About how many elements of a gradient have their squares summed together: whole rows, at least one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint's tensor, or this rank's part of it, lies in a parameter."""

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    start: tuple[int, ...]
    """Index of this part's first element in the checkpoint's tensor."""
    shape: tuple[int, ...]
    """Shape of the checkpoint's tensor."""
    shards: tuple[tuple[int, int, int, int], ...]
    """(first row, end, first column, end) of every virtual shard of it."""
    chunk: int
    """Rows of a chunk, counted from a shard's first."""
    writes: bool
    """Whether this rank is the first of its tensor-parallel group that holds these elements."""


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter within its unit."""

    parameter: int
    """Its number among the model's parameters."""
    offset: int
    rows: int
    width: int
    places: tuple[Place, ...]

    @property
    def stop(self) -> int:
        """Offset of its end in the unit."""
        return self.offset + self.rows * self.width

    def cuts(self) -> set[int]:
        """Offsets in the unit at which a chunk begins or ends."""
        rows = {0, self.rows}
        for place in self.places:
            for first, last, _, _ in place.shards:
                rows |= {*range(first, last, place.chunk), last}
        return {self.offset + row * self.width for row in rows}


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows first … last − 1 of a member, which begin at offset `at` of the requested range."""

    member: Member
    first: int
    last: int
    at: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters of one dtype that are gathered, used and released together."""

    name: str
    dtype: torch.dtype
    members: tuple[Member, ...]
    buckets: tuple[tuple[int, ...], ...]
    """The offsets of every bucket's slots, and its end."""

    @property
    def size(self) -> int:
        """Elements."""
        return self.members[-1].stop

    @property
    def matrices(self) -> bool:
        """Whether stage 3 divides it. Vectors stay whole, as they are few."""
        return self.name != VECTORS

    def slots(self, slot: int) -> list[tuple[int, int]]:
        """(start, end) of that slot in every bucket."""
        return [(cuts[slot], cuts[slot + 1]) for cuts in self.buckets]

    def segments(self, start: int, stop: int) -> Iterator[RowRange]:
        """The rows in [start, stop); both ends must lie between chunks."""
        for member in self.members:
            low, high = max(start, member.offset), min(stop, member.stop)
            if low < high:
                yield RowRange(
                    member, (low - member.offset) // member.width, (high - member.offset) // member.width, low - start
                )


VECTORS = "vectors"


def lay_out(config: ModelConfig, group: RankGroup, copies: int, bucket: int) -> list[Unit]:
    """The units of this rank's part of a model, in the order of forward, the vectors last.

    `group` is the tensor-parallel group, `copies` the number of the model's copies, `bucket` the elements of a bucket.
    """
    model = _shapes(config, group)
    parameters = list(model.parameters())
    places = _places(model, parameters)
    number = {id(parameter): i for i, parameter in enumerate(parameters)}
    taken: set[int] = set()
    vectors: list[int] = []
    units: list[Unit] = []
    for prefix, part in model.parts():
        fresh = [i for i in (number[id(p)] for p in part.parameters()) if i not in taken]
        taken.update(fresh)
        vectors += [i for i in fresh if parameters[i].ndim == 1]
        matrices = [i for i in fresh if parameters[i].ndim == 2 and parameters[i].numel()]
        if matrices:
            units.append(_unit(prefix.strip("."), matrices, parameters, places, copies, bucket))
    return [*units, _unit(VECTORS, vectors, parameters, places, copies, bucket)]


def divide(points: Sequence[int], start: int, stop: int, parts: int) -> tuple[int, ...]:
    """parts + 1 rising offsets from start to stop, each the one of the sorted `points` nearest to an equal share."""
    cuts = [start]
    for i in range(1, parts):
        ideal = start + (stop - start) * i // parts
        after = bisect_left(points, ideal)
        near = points[max(after - 1, 0) : after + 1]
        cuts.append(max(cuts[-1], min(near, key=lambda point: abs(point - ideal))))
    return (*cuts, stop)


def _unit(
    name: str,
    numbers: Sequence[int],
    parameters: Sequence[Tensor],
    places: dict[int, list[Place]],
    copies: int,
    bucket: int,
) -> Unit:
    members, offset = [], 0
    for i in numbers:
        rows, width = _extent(parameters[i])
        members.append(Member(i, offset, rows, width, tuple(places[i])))
        offset = members[-1].stop
    points = sorted(set().union(*(member.cuts() for member in members)))
    bounds = divide(points, 0, offset, -(-offset // bucket))
    buckets = tuple(divide(points, a, b, copies) for a, b in zip(bounds, bounds[1:]) if a < b)
    return Unit(name, parameters[numbers[0]].dtype, tuple(members), buckets)


def _extent(parameter: Tensor) -> tuple[int, int]:
    return (parameter.shape[0], parameter.shape[1]) if parameter.ndim == 2 else (parameter.shape[0], 1)


def _shapes(config: ModelConfig, group: RankGroup) -> Transformer:
    """The model as this rank holds it, of which only shapes exist."""
    alone = RankGroup.of_size(group.size, group.rank)
    alone.sequence = group.sequence
    nothing = cast(TrainingOps, SimpleNamespace(device=torch.device("meta")))
    return Transformer(config, AutogradOps(nothing, config.shards // group.size), group=alone)


def _places(model: Transformer, parameters: Sequence[nn.Parameter]) -> dict[int, list[Place]]:
    """The places of every parameter, by its number."""
    numbers = {_storage(parameter): i for i, parameter in enumerate(parameters)}
    found: dict[int, list[Place]] = {i: [] for i in range(len(parameters))}
    for name, piece in model.tensors():
        if piece.tensor.numel():
            i = numbers[_storage(piece.tensor)]
            found[i].append(_place(name, piece, parameters[i], model.group))
    return found


def _storage(tensor: Tensor) -> int:
    number: Any = tensor.untyped_storage()._cdata
    return int(number)


def _place(name: str, piece: Piece, parameter: Tensor, group: RankGroup) -> Place:
    view, shape = piece.tensor, piece.shape
    width = _extent(parameter)[1]
    row, column = divmod(int(view.storage_offset()), width)
    rows, columns = (row, row + view.shape[0]), (column, column + (view.shape[1] if view.ndim == 2 else 1))
    first = 0 if piece.axis is None else piece.bounds[piece.own.start]
    start = tuple(first if axis == piece.axis else 0 for axis in range(view.ndim))
    shards = []
    for _, shard in piece.shards(view):
        at, left = divmod(int(shard.storage_offset()), width)
        if shard.numel():
            shards.append((at, at + shard.shape[0], left, left + (shard.shape[1] if shard.ndim == 2 else 1)))
    # Of whole rows, so that a cut between chunks is one between rows: in every shard, at every degree.
    chunk = max(1, CHUNK // (shape[1] if len(shape) == 2 else 1))
    return Place(name, rows, columns, start, shape, tuple(shards), chunk, piece.is_first(group))
