"""Attention that trains: forward by the ops, backward by torch, one virtual shard's heads a job."""

from __future__ import annotations

import functools
from dataclasses import dataclass
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
                    _heads(grad, i, ctx.shards)[group.row_R] = part.flatten(0, 1)[group.place_R]

        ctx.pool.map(shard, range(ctx.shards))
        return None, None, None, *grads, None, None, None, None, None


def _heads(x_THd: Tensor, shard: int, shards: int) -> Tensor:
    each = x_THd.shape[1] // shards
    return x_THd.narrow(1, shard * each, each)


@dataclass(slots=True)
class _Group:
    """Sequences of nearly the same length L, as one dense batch of S.

    Rows beyond a sequence's end are padding. No real query sees them and the gradient that arrives at them is
    zeroed, so they give and take nothing.
    """

    row_SL: Tensor
    """Row in the packed step; padding repeats the sequence's last row."""
    real_SL: Tensor
    """Whether it is not padding."""
    row_R: Tensor
    place_R: Tensor
    """Where in S·L the group's real rows are, in the order of `row_R`."""

    def attention_gradients(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, g_THd: Tensor, scale: float,
                            window: int) -> list[Tensor]:
        """Gradients [S, L, heads, d] by q, k and v of dense causal attention."""
        # Contiguous, so that what torch sees does not depend on how many heads stand side by side.
        q, k, v = dense = [x[self.row_SL].transpose(1, 2).contiguous().requires_grad_() for x in (q_THd, k_TGd, v_TGd)]
        g_SHLd = (g_THd[self.row_SL] * self.real_SL[..., None, None]).transpose(1, 2).contiguous()
        length = self.row_SL.shape[1]
        mask = None
        if window:
            at = torch.arange(length, device=q_THd.device)
            back = at[:, None] - at
            mask = (back >= 0) & (back < window)
        with torch.enable_grad():
            out_SHLd = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
                enable_gqa=q_THd.shape[1] != k_TGd.shape[1])
            return [x.transpose(1, 2) for x in torch.autograd.grad(out_SHLd, dense, g_SHLd)]


@functools.lru_cache(maxsize=4)
def _groups(starts: tuple[int, ...], device: torch.device) -> tuple[_Group, ...]:
    """The groups of sequences that begin at `starts`. Remembered, as every layer of a step asks for the same."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, stop in pairwise(starts):
        by_length.setdefault(-(-(stop - start) // PADDING_UNIT), []).append((start, stop))
    groups = []
    for sequences in by_length.values():
        longest = max(stop - start for start, stop in sequences)
        bounds = torch.tensor(sequences, device=device)
        row_SL = bounds[:, :1] + torch.arange(longest, device=device)
        real_SL = row_SL < bounds[:, 1:]
        row_SL = row_SL.minimum(bounds[:, 1:] - 1)
        groups.append(_Group(row_SL, real_SL, row_SL[real_SL], real_SL.flatten().nonzero().squeeze(1)))
    return tuple(groups)
