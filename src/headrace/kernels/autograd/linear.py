"""Products that train: forward and gradients by the ops.

g_… is the gradient of the loss by …; shape suffixes are those of `headrace.kernels.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.autograd import Function

from headrace.kernels.shards import OutputShards, row_bounds, tree
from headrace.kernels.training import TrainingOps

__all__ = ["AddBias", "ColumnKernel", "ColumnLinear", "RowLinear"]


@dataclass(slots=True)
class ColumnKernel:
    """The kernel slot of a linear whose gradients are taken by the virtual shards of its outputs."""

    base: TrainingOps
    weight_NK: Tensor
    bias_N: Tensor | None
    outputs: OutputShards

    def __call__(self, x_TK: Tensor) -> Tensor:
        """x @ weight.T + bias, fp32, in the columns of `outputs`."""
        return ColumnLinear.apply(self.base, x_TK, self.weight_NK, self.bias_N, self.outputs)


class ColumnLinear(Function):
    """Outputs split: the gradient by x is a sum over the shards, that by the weight is each shard's own."""

    @staticmethod
    def forward(
        ctx: Any, base: TrainingOps, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, outputs: OutputShards
    ) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.base, ctx.outputs = base, outputs
        y_TN = base.linear(x_TK.detach(), weight_NK.detach(), _detached(bias_N))
        return y_TN if outputs.spread is None else y_TN.index_select(1, outputs.spread.to(y_TN.device))

    @staticmethod
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        outputs: OutputShards = ctx.outputs
        _, wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        g_TN = g_TN.contiguous()
        g_x = ctx.base.linear_backward_input(g_TN, weight_NK, outputs.spans) if wants_x else None
        g_weight = g_bias = None
        if wants_weight:
            g_weight = outputs.of_rows(ctx.base.linear_backward_weight(g_TN, x_TK)).to(weight_NK.dtype)
        if wants_bias:
            g_bias = outputs.of_rows(_sum_rows(g_TN, ctx.base))
        return None, g_x, g_weight, g_bias, None


class RowLinear(Function):
    """Inputs split: both gradients are each shard's own."""

    @staticmethod
    def forward(
        ctx: Any, ops: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, bounds: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.ops = ops
        return ops.base.linear(x_TK.detach(), weight_NK.detach(), _detached(bias_N), bounds)

    @staticmethod
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        _, wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        base, g_TN = ctx.ops.base, g_TN.contiguous()
        whole = ((0, 0, 0, len(weight_NK)),)
        return (
            None,
            base.linear_backward_input(g_TN, weight_NK, whole) if wants_x else None,
            base.linear_backward_weight(g_TN, x_TK).to(weight_NK.dtype) if wants_weight else None,
            _sum_row_shards(g_TN, ctx.ops) if wants_bias else None,
            None,
        )


class AddBias(Function):
    """A bias after a sum over ranks."""

    @staticmethod
    def forward(ctx: Any, ops: Any, y_TN: Tensor, bias_N: Tensor) -> Tensor:
        ctx.ops = ops
        return y_TN.detach() + bias_N.detach()

    @staticmethod
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, ...]:
        return None, g_TN, _sum_row_shards(g_TN.contiguous(), ctx.ops)


def _sum_rows(g_TN: Tensor, base: TrainingOps) -> Tensor:
    return base.linear_backward_weight(g_TN, g_TN.new_ones(len(g_TN), 1)).squeeze(1)


def _sum_row_shards(g_TN: Tensor, ops: Any) -> Tensor:
    """The sum over T: each row shard's, then a tree."""
    cuts = row_bounds(len(g_TN), ops.row_shards)
    return tree([_sum_rows(g_TN[a:b], ops.base) for a, b in pairwise(cuts)])


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
