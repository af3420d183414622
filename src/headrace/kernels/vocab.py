"""The vocabulary of a model that ranks share (Megatron-LM §3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Sharing", "VocabPart"]


class Sharing(Protocol):
    """What is needed of a group of ranks: `headrace.parallel.group.RankGroup`."""

    def all_reduce(self, x: Tensor, purpose: str, width: int | None = None) -> Tensor: ...

    def all_gather(self, x_RD: Tensor, purpose: str) -> Tensor: ...


@dataclass(frozen=True)
class VocabPart:
    """This rank's part of the vocabulary: tokens from `start`, cut at `bounds` (from 0), shared with `group`."""

    start: int
    bounds: tuple[int, ...]
    group: Sharing
