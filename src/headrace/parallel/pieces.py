"""`Piece`: this rank's part of one checkpoint tensor, and how the virtual shards lie in it.

Loading, saving, initialisation, the gradients' norm and snapshots use pieces, so none of them depends on a layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.panels import Panels, Weight
from headrace.parallel.group import RankGroup

__all__ = ["Piece", "Streams", "gathered", "in_place_of"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A view of local memory. `axis` is what ranks split, None where each holds the whole tensor."""

    tensor: Tensor
    axis: int | None = None
    bounds: tuple[int, ...] = (0,)
    """Offsets on the axis, in the checkpoint's tensor, at which its pieces begin, and its end."""
    own: range = range(0)
    """Which of those pieces are here."""
    replicas: int = 1
    """How many consecutive ranks hold the same; for an unsplit tensor, all of them."""
    panels: Panels | None = None
    """Where the rows are, if not in `tensor`, which has then no data (it is on the meta device)."""
    first: int = 0
    """The first of its rows in `panels`."""

    @classmethod
    def of_weight(
        cls, weight: Weight, axis: int, bounds: Sequence[int], group: RankGroup, rows: slice | None = None
    ) -> Piece:
        """A part along `axis`, cut at `bounds`, that is stored as `rows` of a weight (None: as all of it)."""
        if isinstance(weight, Tensor):
            return cls.split(weight.detach() if rows is None else weight.detach()[rows], axis, bounds, group)
        first, stop = (0, weight.shape[0]) if rows is None else (rows.start, rows.stop)
        shape = torch.empty(stop - first, weight.shape[1], dtype=weight.dtype, device="meta")
        return replace(cls.split(shape, axis, bounds, group), panels=weight, first=first)

    @classmethod
    def split(cls, tensor: Tensor, axis: int, bounds: Sequence[int], group: RankGroup) -> Piece:
        """A part along `axis`, cut at `bounds`."""
        count = len(bounds) - 1
        return cls(tensor, axis, tuple(bounds), group.own(count), max(1, group.size // count))

    @classmethod
    def whole(cls, tensor: Tensor, group: RankGroup) -> Piece:
        """A tensor that every rank has."""
        return cls(tensor, replicas=group.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the checkpoint's tensor."""
        shape = list(self.tensor.shape)
        if self.axis is not None:
            shape[self.axis] = self.bounds[-1]
        return tuple(shape)

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part of the checkpoint's tensor."""
        if self.axis is None:
            return whole
        start, stop = self.bounds[self.own.start], self.bounds[self.own.stop]
        return whole.narrow(self.axis, start, stop - start)

    def fill(self, whole: Tensor) -> None:
        """Copy this rank's part of the checkpoint's tensor here, rounded to the dtype that is stored."""
        if self.panels is None:
            self.tensor.copy_(self.of(whole))
        else:
            self.panels.put(self.first, self.of(whole))

    def read(self) -> Tensor:
        """This part as rows: `tensor` itself, or a copy of what lies in panels."""
        return self.tensor if self.panels is None else self.panels.rows(self.first, self.first + len(self.tensor))

    def shards(self, local: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(number, view) of each of the pieces of `local`, which is shaped like `tensor`."""
        if self.axis is None:
            yield 0, local
            return
        start = self.bounds[self.own.start]
        for i in self.own:
            yield i, local.narrow(self.axis, self.bounds[i] - start, self.bounds[i + 1] - self.bounds[i])

    def is_first(self, group: RankGroup) -> bool:
        """Whether this rank is the first of those that hold the same: it writes for them."""
        return group.rank % self.replicas == 0


def in_place_of(
    pieces: Iterable[tuple[str, Piece]], parameters: Sequence[Tensor], others: Sequence[Tensor]
) -> Iterator[tuple[str, Piece]]:
    """The pieces as views of tensors that stand in the parameters' places, such as their gradients.

    Pieces of no parameter among these, and empty ones, are left out.
    """
    places: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for parameter, other in zip(parameters, others, strict=True):
        places.setdefault(parameter.untyped_storage().data_ptr(), []).append((parameter, other))
    for name, piece in pieces:
        view = piece.tensor
        for parameter, other in places.get(view.untyped_storage().data_ptr(), ()):
            ahead = view.storage_offset() - parameter.storage_offset()
            if view.numel() and 0 <= ahead < parameter.numel():
                other = other.contiguous()
                place = other.as_strided(view.shape, view.stride(), other.storage_offset() + ahead)
                yield name, replace(piece, tensor=place)


class Streams:
    """The random streams of initialisation (Megatron-LM §3): one that all ranks share, and one a virtual shard.

    A rank has the streams of its own shards only, so the weights are the same at every degree.
    """

    def __init__(self, seed: int, shards: int, group: RankGroup) -> None:
        """`shards` is V."""
        self._outer = _generator(seed, 0)
        self._inner = {i: _generator(seed, 1 + i) for i in group.own(shards)}
        self._count = shards

    def normal_(self, piece: Piece, std: float) -> None:
        """Fill a piece with normal numbers, drawn in fp32 on the host, so that they do not depend on the device."""
        if piece.axis is not None and len(piece.bounds) - 1 == self._count:
            for shard, view in piece.shards(piece.tensor):
                view.copy_(torch.empty(view.shape).normal_(0.0, std, generator=self._inner[shard]))
        else:
            piece.tensor.copy_(piece.of(torch.empty(piece.shape).normal_(0.0, std, generator=self._outer)))


def _generator(seed: int, stream: int) -> torch.Generator:
    # torch's generator looks at 32 bits of its seed.
    state = np.random.SeedSequence([seed, stream]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(state))


def gathered(piece: Piece, group: RankGroup) -> Tensor | None:
    """On rank 0 the checkpoint's whole tensor; None elsewhere. Every rank calls it."""
    if piece.axis is None or group.size == 1:
        return piece.read() if group.rank == 0 else None
    shapes, count = [], len(piece.bounds) - 1
    for rank in range(group.size):
        own = group.own(count, rank)
        shape = list(piece.tensor.shape)
        # Of ranks that hold the same, the first one sends.
        shape[piece.axis] = piece.bounds[own.stop] - piece.bounds[own.start] if rank % piece.replicas == 0 else 0
        shapes.append(shape)
    mine = piece.read() if piece.is_first(group) else torch.empty(shapes[group.rank], dtype=piece.tensor.dtype)
    parts = group.gather(mine, shapes, "save")
    return None if parts is None else torch.cat(parts, piece.axis)
