"""Attention that trains: both ways by the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from headrace.kernels.base import cache_of
from headrace.kernels.ops import AttentionMeta
from headrace.kernels.training import TrainingOps

__all__ = ["CausalAttention"]


class CausalAttention(Function):
    """Of whole packed sequences, through a paged cache that lives for one call."""

    @staticmethod
    def forward(
        ctx: Any,
        ops: TrainingOps,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        meta: AttentionMeta,
        block_size: int,
        cache_dtype: torch.dtype,
        scale: float,
        window: int,
    ) -> Tensor:
        q_THd, k_TGd, v_TGd = q_THd.detach(), k_TGd.detach(), v_TGd.detach()
        blocks = cache_of(ops, k_TGd, v_TGd, meta, block_size, cache_dtype)
        lse_TH = torch.empty(q_THd.shape[:2], device=q_THd.device) if any(ctx.needs_input_grad) else None
        out_THd = ops.attention(q_THd, blocks, 0, meta, scale, window, lse_TH)
        if lse_TH is not None:
            ctx.save_for_backward(q_THd, k_TGd, v_TGd, out_THd, lse_TH)
        ctx.ops, ctx.meta, ctx.cache_dtype, ctx.scale, ctx.window = ops, meta, cache_dtype, scale, window
        return out_THd

    @staticmethod
    def backward(ctx: Any, g_THd: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_TGd, v_TGd, out_THd, lse_TH = ctx.saved_tensors
        k_TGd, v_TGd = (x.to(ctx.cache_dtype).float() for x in (k_TGd, v_TGd))
        grads = ctx.ops.attention_backward(
            g_THd.contiguous(), q_THd, k_TGd, v_TGd, out_THd, lse_TH, ctx.meta.query_start_S1, ctx.scale, ctx.window
        )
        return None, *grads, None, None, None, None, None
