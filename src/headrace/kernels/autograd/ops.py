"""`AutogradOps`: the op set with gradients. Forward by any `Ops`, so the trainer has the server's bits.

Gradients too have the same bits at every degree of tensor parallelism and for every number of threads. Shape suffixes
are those of `headrace.kernels.ops`; g_… is the gradient of the loss by ….
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from headrace.kernels.autograd.attention import CausalAttention
from headrace.kernels.autograd.entropy import HeadLoss, LogProbability
from headrace.kernels.autograd.linear import AddBias, ColumnKernel, RowLinear
from headrace.kernels.delegate import DelegatingOps
from headrace.kernels.ops import AttentionMeta, Kernel, Ops
from headrace.kernels.panels import Weight, rows_of
from headrace.kernels.shards import OutputShards, row_bounds, tree
from headrace.kernels.training import TrainingOps
from headrace.kernels.vocab import VocabPart

__all__ = ["AutogradOps"]


class AutogradOps(DelegatingOps):
    """`Ops` whose forward ops are those of `base` and differentiable; the others are `base`'s own.

    Gradients are sums over `shards`, this rank's virtual shards, or over `row_shards`, runs of rows, each summed
    alone, then in a balanced tree.
    """

    columns_per_shard = True

    def __init__(self, base: TrainingOps, shards: int = 1, row_shards: int = 1) -> None:
        super().__init__(base)
        self.shards, self.row_shards = shards, row_shards
        self._tables: tuple[Tensor, Tensor] | None = None

    def embedding(self, ids_T: Tensor, table_VD: Weight) -> Tensor:
        return _Embedding.apply(self.base, ids_T, rows_of(table_VD))

    def linear(
        self, x_TK: Tensor, weight_NK: Weight, bias_N: Tensor | None = None, bounds: Sequence[int] | None = None
    ) -> Tensor:
        return RowLinear.apply(self, x_TK, rows_of(weight_NK), bias_N, tuple(bounds or (0, x_TK.shape[1])))

    def column_kernel(self, weight_NK: Weight, bias_N: Tensor | None, outputs: OutputShards) -> Kernel:
        return ColumnKernel(self.base, rows_of(weight_NK), bias_N, outputs)

    def add_bias(self, y_TN: Tensor, bias_N: Tensor) -> Tensor:
        return AddBias.apply(self, y_TN, bias_N)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return _RMSNorm.apply(self, x_TD, weight_D, eps)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return _AddRMSNorm.apply(self, x_TD, residual_TD, weight_D, eps)

    def rotary(
        self, x_THd: Tensor, positions_T: Tensor, table_Pd: Tensor, weight_d: Tensor | None = None, eps: float = 0.0
    ) -> Tensor:
        return _Rotary.apply(self, x_THd, positions_T, table_Pd, weight_d, eps)

    def silu_mul(self, gate_up_TI: Tensor) -> Tensor:
        return _SiluMul.apply(self.base, gate_up_TI)

    def dropout(self, x_TD: Tensor, key: int, row_T: Tensor, first_feature: int, rate: float) -> Tensor:
        return _Dropout.apply(self.base, x_TD, key, row_T, first_feature, rate) if rate else x_TD

    def causal_attention(
        self,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        meta: AttentionMeta,
        block_size: int,
        cache_dtype: torch.dtype,
        scale: float,
        window: int = 0,
    ) -> Tensor:
        return CausalAttention.apply(self.base, q_THd, k_TGd, v_TGd, meta, block_size, cache_dtype, scale, window)

    def log_probability(self, logits_RV: Tensor, targets_R: Tensor, part: VocabPart) -> Tensor:
        return LogProbability.apply(self.base, logits_RV, targets_R, part)

    def head_loss(
        self, x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, weight_R: Tensor, part: VocabPart
    ) -> tuple[Tensor, Tensor]:
        return HeadLoss.apply(self.base, x_RD, weight_VD, targets_R, weight_R, part)

    def turned_back(self, table_Pd: Tensor) -> Tensor:
        """The table of the transposed rotation: its sines negated. Kept, since every layer uses the same one."""
        if self._tables is None or self._tables[0] is not table_Pd:
            cos, sin = table_Pd.chunk(2, -1)
            self._tables = table_Pd, torch.cat((cos, -sin), -1)
        return self._tables[1]

    def norm_gradients(self, g_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(g_x, g_weight) of `rms_norm`, the weight's summed by runs of rows."""
        bounds = row_bounds(len(x_TD), self.row_shards)
        g_x, g_weight = self.base.rms_norm_backward(g_TD.contiguous(), x_TD, weight_D, eps, bounds)
        return g_x, tree(list(g_weight)).to(weight_D.dtype)


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, ids_T: Tensor, table_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids_T)
        ctx.rows, ctx.dtype = table_VD.shape[0], table_VD.dtype
        return ops.embedding(ids_T, table_VD.detach())

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        (ids_T,) = ctx.saved_tensors
        g_VD = torch.ops.aten.embedding_dense_backward(g_TD, ids_T.long(), ctx.rows, -1, False)
        return None, None, g_VD.to(ctx.dtype)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, ops: AutogradOps, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_TD, weight_D)
        ctx.ops, ctx.eps = ops, eps
        return ops.base.rms_norm(x_TD.detach(), weight_D.detach(), eps)

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D = ctx.saved_tensors
        return None, *ctx.ops.norm_gradients(g_TD, x_TD, weight_D, ctx.eps), None


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: AutogradOps, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed_TD, sum_TD = ops.base.add_rms_norm(x_TD.detach(), residual_TD.detach(), weight_D.detach(), eps)
        ctx.save_for_backward(sum_TD, weight_D)
        ctx.ops, ctx.eps = ops, eps
        ctx.set_materialize_grads(False)
        return normed_TD, sum_TD

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor | None, g_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        if g_TD is None:
            return None, g_sum, g_sum, None, None
        sum_TD, weight_D = ctx.saved_tensors
        g_x, g_weight = ctx.ops.norm_gradients(g_TD, sum_TD, weight_D, ctx.eps)
        g_x = g_x if g_sum is None else g_x.add_(g_sum)
        return None, g_x, g_x, g_weight, None


class _Rotary(Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: AutogradOps,
        x_THd: Tensor,
        positions_T: Tensor,
        table_Pd: Tensor,
        weight_d: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(*((x_THd, weight_d) if weight_d is not None else ()), positions_T)
        ctx.ops, ctx.table_Pd, ctx.eps = ops, table_Pd, eps
        weight_d = None if weight_d is None else weight_d.detach()
        return ops.base.rotary(x_THd.detach(), positions_T, table_Pd, weight_d, eps)

    @staticmethod
    def backward(ctx: Any, g_THd: Tensor) -> tuple[Tensor | None, ...]:
        *normed, positions_T = ctx.saved_tensors
        ops: AutogradOps = ctx.ops
        g_x = ops.base.rotary(g_THd, positions_T, ops.turned_back(ctx.table_Pd))
        if not normed:
            return None, g_x, None, None, None, None
        x_THd, weight_d = normed
        rows, shards = x_THd.shape[0] * x_THd.shape[1] // ops.shards, ops.shards
        # The weight's gradient is summed by virtual shards, whose heads are brought together: [shard, T, heads, d].
        g_rows, x_rows = (_by_shard(x, shards).reshape(-1, x.shape[-1]) for x in (g_x, x_THd))
        bounds = [i * rows for i in range(shards + 1)]
        g_x, g_weight = ops.base.rms_norm_backward(g_rows, x_rows, weight_d, ctx.eps, bounds)
        g_x = _from_shards(g_x, x_THd.shape, shards)
        return None, g_x, None, None, tree(list(g_weight)).to(weight_d.dtype), None


def _by_shard(x_THd: Tensor, shards: int) -> Tensor:
    return x_THd.unflatten(1, (shards, x_THd.shape[1] // shards)).transpose(0, 1).contiguous()


def _from_shards(x: Tensor, shape: torch.Size, shards: int) -> Tensor:
    tokens, heads, dim = shape
    return x.view(shards, tokens, heads // shards, dim).transpose(0, 1).reshape(shape)


class _SiluMul(Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, gate_up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TI)
        ctx.ops = ops
        return ops.silu_mul(gate_up_TI.detach())

    @staticmethod
    def backward(ctx: Any, g_TI: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.ops.silu_mul_backward(g_TI.contiguous(), *ctx.saved_tensors)


class _Dropout(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: TrainingOps, x_TD: Tensor, key: int, row_T: Tensor, first_feature: int, rate: float
    ) -> Tensor:
        # The rows' numbers are the batch's; as a saved tensor they would make a block recompute to its very end.
        ctx.ops, ctx.where = ops, (key, row_T, first_feature, rate)
        return ops.dropout(x_TD.detach(), *ctx.where)

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.ops.dropout(g_TD.contiguous(), *ctx.where), None, None, None, None
