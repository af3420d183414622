"""`AttentionContext`, the interface between model and attention, and the layout of packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from headrace.errors import ConfigError
from headrace.kernels.ops import AttentionMeta

__all__ = ["AttentionContext", "PagedLayers", "packed_meta", "packed_positions"]


PagedLayers = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(embedded rows [T, D], positions [T]) → the last block's (x, residual)."""


class AttentionContext(Protocol):
    """Where keys and values live during one forward pass. T tokens, H query heads, G kv heads, d head_dim."""

    layers: PagedLayers | None
    """All blocks as one call, where there is one: the model then calls it in place of its blocks."""

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """Keep k and v of the new rows, then attend causally to all of each row's prefix: [T, H, d] fp32."""
        ...


def packed_meta(lengths: Sequence[int], block_size: int, device: torch.device) -> AttentionMeta:
    """The layout of whole sequences, packed one after another, each starting at position 0.

    Sequence s has its own consecutive blocks, counted up from 1: block 0 is the null block.
    """
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"lengths={list(lengths)!r}: every packed sequence must have at least one token")
    counts = [-(-length // block_size) for length in lengths]
    first = list(accumulate(counts, initial=1))
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, (count, start) in enumerate(zip(counts, first)):
        table[row, :count] = torch.arange(start, start + count, dtype=torch.int32)
    slots = torch.cat(
        [
            torch.arange(start * block_size, start * block_size + length, dtype=torch.int32)
            for length, start in zip(lengths, first)
        ]
    )
    return AttentionMeta(
        block_table_SM=table.to(device),
        query_start_S1=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        context_len_S=torch.tensor(list(lengths), dtype=torch.int32, device=device),
        slots_T=slots.to(device),
        max_query=max(lengths),
        max_context=max(lengths),
    )


def packed_positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Positions [T] int64 of whole sequences packed one after another: 0, 1, …, 0, 1, …"""
    return torch.cat([torch.arange(length) for length in lengths]).to(device)
