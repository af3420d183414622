"""`Region`: the part of a checkpoint's tensor that lies in this rank's memory; and the geometry of such rectangles.

Snapshots use nothing else of a layout, so ranks of any layout can read what others have written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.parallel.group import RankGroup
from headrace.parallel.pieces import Piece

__all__ = ["Box", "Region", "box_at", "dtype_name", "inside", "overlap", "regions_of", "require_whole", "volume"]

Box = tuple[tuple[int, int], ...]
"""(first, one after the last) on each axis: a rectangle of a tensor."""


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of a checkpoint's tensor that lies in this rank's memory."""

    tensor: Tensor
    """A live view, any strides, 1 or 2 axes: read when saving, filled when loading."""
    start: tuple[int, ...]
    """Where it begins in the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    writes: bool = True
    """Whether this rank writes it: of ranks that hold the same, the first."""

    @property
    def box(self) -> Box:
        """What it covers of the whole tensor."""
        return box_at(self.start, self.tensor.shape)


def regions_of(
    kind: str, pieces: Iterable[tuple[str, Piece]], group: RankGroup, writes: bool = True
) -> Iterator[tuple[str, Region]]:
    """("kind/checkpoint name", region) of each piece but empty ones. `writes`: whether this copy does."""
    for name, piece in pieces:
        if piece.tensor.numel():
            start = [0] * piece.tensor.ndim
            if piece.axis is not None:
                start[piece.axis] = piece.bounds[piece.own.start]
            yield f"{kind}/{name}", Region(piece.tensor, tuple(start), piece.shape, writes and piece.is_first(group))


def dtype_name(dtype: torch.dtype) -> str:
    """As recipes write it: "float32"."""
    return str(dtype).removeprefix("torch.")


def box_at(start: Iterable[int], shape: Iterable[int]) -> Box:
    """A rectangle of `shape` that begins at `start`."""
    return tuple((first, first + length) for first, length in zip(start, shape, strict=True))


def overlap(a: Box, b: Box) -> Box | None:
    """What two rectangles have in common, if anything."""
    both = tuple((max(i, k), min(j, m)) for (i, j), (k, m) in zip(a, b, strict=True))
    return both if all(first < last for first, last in both) else None


def inside(box: Box, start: Iterable[int]) -> tuple[slice, ...]:
    """`box` as an index into a tensor that begins at `start`."""
    return tuple(slice(first - at, last - at) for (first, last), at in zip(box, start, strict=True))


def volume(box: Box) -> int:
    """Elements of a rectangle."""
    return math.prod(last - first for first, last in box)


def require_whole(name: str, shape: tuple[int, ...], boxes: Iterable[Box]) -> None:
    """Raise `CheckpointError` naming the tensor unless `boxes` cover every element of `shape` just once."""
    open_: list[Box] = []
    count = 0
    for box in sorted(boxes):
        if len(box) != len(shape) or not all(0 <= first < last <= size for (first, last), size in zip(box, shape)):
            raise CheckpointError(f"{name} has shape {list(shape)}, and a rank holds {_text(box)} of it")
        # In the order of first rows, a rectangle can only overlap those whose rows have not ended.
        open_ = [other for other in open_ if other[0][1] > box[0][0]]
        for other in open_:
            if overlap(box, other):
                raise CheckpointError(f"{name} is held twice: {_text(other)} and {_text(box)} overlap")
        open_.append(box)
        count += volume(box)
    if count != math.prod(shape):
        raise CheckpointError(f"{name} has a hole: ranks hold {count} of its {math.prod(shape)} elements")


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{first}:{last}" for first, last in box) + "]"
