"""Products that train: forward by the ops, gradients by virtual shard.

g_… is the gradient of the loss by …; shape suffixes are those of `headrace.kernels.ops`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from headrace.kernels.autograd.shards import OutputShards, row_bounds, tree

__all__ = ["AddBias", "ColumnLinear", "RowLinear"]


class ColumnLinear(Function):
    """Outputs split: the gradient by x is a sum over the shards, that by the weight is each shard's own."""

    @staticmethod
    def forward(ctx: Any, ops: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None,
                outputs: OutputShards) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.pool, ctx.outputs = ops.pool, outputs
        y_TN = ops.base.linear(x_TK.detach(), weight_NK.detach(), _detached(bias_N))
        return y_TN if outputs.spread is None else y_TN.index_select(1, outputs.spread.to(y_TN.device))

    @staticmethod
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        outputs: OutputShards = ctx.outputs
        _, wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad

        def shard(i: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            g_Tn = outputs.take(i, g_TN, 1, outputs.columns)
            g_x = g_Tn @ outputs.take(i, weight_NK, 0, outputs.rows).float() if wants_x else None
            g_weight = g_Tn.mT @ x_TK if wants_weight else None
            return g_x, g_weight, g_Tn.mT @ g_Tn.new_ones(len(g_Tn)) if wants_bias else None

        g_x, g_weight, g_bias = zip(*ctx.pool.map(shard, range(len(outputs.rows))))
        return (None, tree(g_x) if wants_x else None,
                outputs.gather_rows(g_weight).to(weight_NK.dtype) if wants_weight else None,
                outputs.gather_rows(g_bias) if wants_bias else None, None)


class RowLinear(Function):
    """Inputs split: both gradients are each shard's own."""

    @staticmethod
    def forward(ctx: Any, ops: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None,
                bounds: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.ops, ctx.bounds = ops, bounds
        return ops.base.linear(x_TK.detach(), weight_NK.detach(), _detached(bias_N), bounds)

    @staticmethod
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        _, wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        g_x = torch.empty_like(x_TK) if wants_x else None
        g_weight = torch.empty_like(weight_NK) if wants_weight else None

        def shard(cut: tuple[int, int]) -> None:
            columns = slice(*cut)
            if g_x is not None:
                g_x[:, columns] = g_TN @ weight_NK[:, columns].float().contiguous()
            if g_weight is not None:
                g_weight[:, columns] = g_TN.mT @ x_TK[:, columns].contiguous()

        ctx.ops.pool.map(shard, pairwise(ctx.bounds))
        return None, g_x, g_weight, _sum_rows(g_TN, ctx.ops) if wants_bias else None, None


class AddBias(Function):
    """A bias after a sum over ranks."""

    @staticmethod
    def forward(ctx: Any, ops: Any, y_TN: Tensor, bias_N: Tensor) -> Tensor:
        ctx.ops = ops
        return y_TN.detach() + bias_N.detach()

    @staticmethod
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, ...]:
        return None, g_TN, _sum_rows(g_TN, ctx.ops)


def _sum_rows(g_TN: Tensor, ops: Any) -> Tensor:
    """The sum over T: each row shard's, then a tree."""
    cuts = row_bounds(len(g_TN), ops.row_shards)

    def shard(cut: tuple[int, int]) -> Tensor:
        rows_RN = g_TN[slice(*cut)].clone()
        return rows_RN.mT @ rows_RN.new_ones(len(rows_RN))

    return tree(ops.pool.map(shard, pairwise(cuts)))


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
