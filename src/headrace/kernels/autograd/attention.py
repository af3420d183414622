"""Attention that trains: forward by the ops, backward by torch, one virtual shard's heads a job."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from headrace.kernels.autograd.shards import ShardPool
from headrace.kernels.ops import AttentionMeta, Ops

__all__ = ["CausalAttention"]

PADDING_UNIT = 32
"""Sequences whose lengths round up to the same multiple of this share one dense attention in backward."""


class CausalAttention(Function):
    """Of whole packed sequences, through a paged cache that lives for one call."""

    @staticmethod
    def forward(ctx: Any, ops: Ops, pool: ShardPool, shards: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor,
                meta: AttentionMeta, block_size: int, cache_dtype: torch.dtype, scale: float, window: int) -> Tensor:
        q_THd, k_TGd, v_TGd = q_THd.detach(), k_TGd.detach(), v_TGd.detach()
        num_blocks = int(meta.block_table_SM.max()) + 1
        shape = (num_blocks, 1, 2, k_TGd.shape[1], block_size, k_TGd.shape[2])
        blocks = torch.empty(shape, dtype=cache_dtype, device=q_THd.device)
        ops.store_kv_(k_TGd, v_TGd, blocks, 0, meta.slots_T)
        ctx.save_for_backward(q_THd, k_TGd, v_TGd)
        ctx.meta, ctx.cache_dtype, ctx.scale, ctx.window = meta, cache_dtype, scale, window
        ctx.pool, ctx.shards = pool, shards
        return ops.attention(q_THd, blocks, 0, meta, scale, window)

    @staticmethod
    def backward(ctx: Any, g_THd: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_TGd, v_TGd = ctx.saved_tensors
        k_TGd, v_TGd = (x.to(ctx.cache_dtype).float() for x in (k_TGd, v_TGd))
        grads = tuple(torch.empty(x.shape, device=x.device) for x in (q_THd, k_TGd, v_TGd))
        groups = _groups(tuple(ctx.meta.query_start_S1.tolist()), q_THd.device)

        def shard(i: int) -> None:
            """The heads of one virtual shard, of every sequence."""
            q, k, v, g = (_heads(x, i, ctx.shards) for x in (q_THd, k_TGd, v_TGd, g_THd))
            for group in groups:
                parts = group.attention_gradients(q, k, v, g, ctx.scale, ctx.window)
                for grad, part in zip(grads, parts):
                    group.put(_heads(grad, i, ctx.shards), part)

        ctx.pool.map(shard, range(ctx.shards))
        return None, None, None, *grads, None, None, None, None, None


def _heads(x_THd: Tensor, shard: int, shards: int) -> Tensor:
    each = x_THd.shape[1] // shards
    return x_THd.narrow(1, shard * each, each)


class _Run:
    """`count` sequences of one length that lie side by side from row `start`: a dense batch as they are."""

    def __init__(self, start: int, count: int, length: int) -> None:
        self.length = length
        self._rows = slice(start, start + count * length)
        self._shape = (count, length)

    def take(self, x_THd: Tensor) -> Tensor:
        """[S, L, heads, d]"""
        return x_THd[self._rows].unflatten(0, self._shape)

    take_gradient = take

    def put(self, x_THd: Tensor, part_SLHd: Tensor) -> None:
        """Fill these sequences' rows."""
        x_THd[self._rows] = part_SLHd.flatten(0, 1)

    def attention_gradients(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, g_THd: Tensor, scale: float,
                            window: int) -> list[Tensor]:
        """Gradients [S, L, heads, d] by q, k and v of dense causal attention."""
        # Contiguous, so that what torch sees does not depend on how many heads stand side by side.
        q, k, v = dense = [self.take(x).transpose(1, 2).contiguous().requires_grad_() for x in (q_THd, k_TGd, v_TGd)]
        g_SHLd = self.take_gradient(g_THd).transpose(1, 2).contiguous()
        mask = None
        if window:
            at = torch.arange(self.length, device=q_THd.device)
            back = at[:, None] - at
            mask = (back >= 0) & (back < window)
        with torch.enable_grad():
            out_SHLd = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
                enable_gqa=q_THd.shape[1] != k_TGd.shape[1])
            return [x.transpose(1, 2) for x in torch.autograd.grad(out_SHLd, dense, g_SHLd)]


class _Padded(_Run):
    """Sequences of nearly the same length, wherever they lie, padded to the longest.

    No real query sees padding and the gradient that arrives at it is zeroed, so it gives and takes nothing.
    """

    def __init__(self, sequences: list[tuple[int, int]], device: torch.device) -> None:
        self.length = max(stop - start for start, stop in sequences)
        bounds = torch.tensor(sequences, device=device)
        row_SL = bounds[:, :1] + torch.arange(self.length, device=device)
        self._real_SL = row_SL < bounds[:, 1:]
        self._row_SL = row_SL.minimum(bounds[:, 1:] - 1)  # padding repeats the sequence's last row
        self._row_R = self._row_SL[self._real_SL]
        self._place_R = self._real_SL.flatten().nonzero().squeeze(1)

    def take(self, x_THd: Tensor) -> Tensor:
        return x_THd[self._row_SL]

    def take_gradient(self, x_THd: Tensor) -> Tensor:
        return x_THd[self._row_SL] * self._real_SL[..., None, None]

    def put(self, x_THd: Tensor, part_SLHd: Tensor) -> None:
        x_THd[self._row_R] = part_SLHd.flatten(0, 1)[self._place_R]


@functools.lru_cache(maxsize=4)
def _groups(starts: tuple[int, ...], device: torch.device) -> tuple[_Run, ...]:
    """The groups of sequences that begin at `starts`. Remembered, as every layer of a step asks for the same."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, stop in pairwise(starts):
        by_length.setdefault(-(-(stop - start) // PADDING_UNIT), []).append((start, stop))
    return tuple(_group(sequences, device) for sequences in by_length.values())


def _group(sequences: list[tuple[int, int]], device: torch.device) -> _Run:
    lengths = {stop - start for start, stop in sequences}
    if len(lengths) == 1 and all(a[1] == b[0] for a, b in pairwise(sequences)):
        return _Run(sequences[0][0], len(sequences), lengths.pop())
    return _Padded(sequences, device)
