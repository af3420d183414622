"""A rank's regions in host memory, in the layout of their safetensors file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from headrace.model.tensorfiles import file_header
from headrace.parallel.regions import Region

__all__ = ["Staged", "Staging"]


@dataclass(frozen=True, slots=True)
class Staged:
    """One copied region."""

    name: str
    dtype: torch.dtype
    start: tuple[int, ...]
    shape: tuple[int, ...]
    at: int
    """Offset of its first byte."""

    @property
    def end(self) -> int:
        """Offset of the end of its bytes."""
        return self.at + math.prod(self.shape) * self.dtype.itemsize

    @property
    def key(self) -> str:
        """Its name in the file: that of the tensor and the rows and columns, as `first/model.norm.weight[0:32]`."""
        return self.name + "[" + ",".join(f"{a}:{a + n}" for a, n in zip(self.start, self.shape)) + "]"

    def record(self) -> dict[str, Any]:
        """Its entry in snapshot.json."""
        return {"key": self.key, "start": self.start, "shape": self.shape}


class Staging:
    """A buffer that is allocated once and refilled for every snapshot."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fill(self, regions: Iterable[tuple[str, Region]]) -> list[Staged]:
        """Copy the regions that this rank writes, over those of the snapshot before."""
        mine = [(name, region) for name, region in regions if region.writes]
        # The widest dtype first, so that each tensor is aligned to its element size.
        mine.sort(key=lambda one: -one[1].tensor.dtype.itemsize)
        self._reserve(sum(region.tensor.nbytes for _, region in mine), any(r.tensor.is_cuda for _, r in mine))
        staged, at = [], 0
        for name, region in mine:
            shape = tuple(region.tensor.shape)
            one = Staged(name, region.tensor.dtype, region.start, shape, at)
            self._buffer[at : one.end].view(one.dtype).view(shape).copy_(region.tensor.detach())
            staged.append(one)
            at = one.end
        return staged

    def file(self, staged: list[Staged]) -> Iterator[bytes | memoryview]:
        """The bytes of a safetensors file with the regions that `fill` copied."""
        yield file_header({one.key: (one.dtype, one.shape, one.at) for one in staged})
        data: Any = self._buffer[: staged[-1].end].numpy()
        yield memoryview(data)

    def _reserve(self, size: int, pinned: bool) -> None:
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
