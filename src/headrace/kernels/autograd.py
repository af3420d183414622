"""The op set with gradients: forward by any `Ops`, so the trainer has the server's bits; backward in torch.

Only forward owes bits to anybody, so backward takes torch's own products and attention. Shape suffixes are
those of `headrace.kernels.ops`; g_… is the gradient of the loss by ….
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from headrace.kernels.delegate import DelegatingOps
from headrace.kernels.ops import AttentionMeta, Ops
from headrace.kernels.shards import OutputShards, ShardPool, tree

__all__ = ["AutogradOps", "causal_attention", "log_probability"]

PADDING_UNIT = 32
"""Sequences whose lengths round up to the same multiple of this share one dense attention in backward."""


class AutogradOps(DelegatingOps):
    """`Ops` whose forward ops are those of `base` and differentiable; the others are `base`'s own.

    Gradients are sums over `shards`, this rank's virtual shards, or over `row_shards`, runs of rows, each summed
    alone, then in a balanced tree: so they have the same bits at every degree of tensor parallelism.
    """

    def __init__(self, base: Ops, shards: int = 1, row_shards: int = 1) -> None:
        super().__init__(base)
        self.shards, self.row_shards = shards, row_shards
        self.pool = ShardPool(getattr(base, "threads", 1))

    def embedding(self, ids_T: Tensor, table_VD: Tensor) -> Tensor:
        return _Embedding.apply(self.base, ids_T, table_VD)

    def linear(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None,
               bounds: Sequence[int] | None = None) -> Tensor:
        return _Linear.apply(self.base, x_TK, weight_NK, bias_N, bounds)

    def sharded_linear(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, bounds: Sequence[int] | None,
                       outputs: OutputShards | None) -> Tensor:
        """`linear` whose gradients are taken by virtual shard: of its inputs, at `bounds`, or of its outputs.

        The result has the columns of `outputs`, which are its rows unless shards share some.
        """
        if outputs is None:
            return _RowLinear.apply(self, x_TK, weight_NK, bias_N, tuple(bounds or (0, x_TK.shape[1])))
        return _ColumnLinear.apply(self, x_TK, weight_NK, bias_N, outputs)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return _RMSNorm.apply(self.base, x_TD, weight_D, eps)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor,
                     eps: float) -> tuple[Tensor, Tensor]:
        return _AddRMSNorm.apply(self.base, x_TD, residual_TD, weight_D, eps)

    def rotary(self, x_THd: Tensor, positions_T: Tensor, table_Pd: Tensor,
               weight_d: Tensor | None = None, eps: float = 0.0) -> Tensor:
        return _Rotary.apply(self.base, x_THd, positions_T, table_Pd, weight_d, eps)

    def silu_mul(self, gate_up_TI: Tensor) -> Tensor:
        return _SiluMul.apply(self.base, gate_up_TI)


def log_probability(ops: Ops, logits_RV: Tensor, targets_R: Tensor, bounds: Sequence[int]) -> Tensor:
    """log p(target) [R] fp32, by `ops.logsumexp` over the vocabulary's shards and `ops.score`.

    These are the server's bits. The cross entropy of a step is −mean of it.
    """
    return _LogProbability.apply(ops, logits_RV, targets_R, bounds)


def causal_attention(ops: Ops, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, meta: AttentionMeta,
                     block_size: int, cache_dtype: torch.dtype, scale: float, window: int = 0) -> Tensor:
    """Attention of whole packed sequences (rows = context in `meta`) by `ops.attention`: [T, H, d] fp32.

    k and v go through a paged cache of `cache_dtype` that lives for this call. Its rounding has gradient one.
    """
    return _CausalAttention.apply(ops, q_THd, k_TGd, v_TGd, meta, block_size, cache_dtype, scale, window)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


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


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None,
                bounds: Sequence[int] | None) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return ops.linear(x_TK.detach(), weight_NK.detach(), _detached(bias_N), bounds)

    @staticmethod
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        g_x = g_TN @ weight_NK.float() if ctx.needs_input_grad[1] else None
        g_weight = (g_TN.mT @ x_TK).to(weight_NK.dtype) if ctx.needs_input_grad[2] else None
        g_bias = g_TN.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return None, g_x, g_weight, g_bias, None


class _ColumnLinear(Function):
    """Outputs split: the gradient by x is a sum over the shards, that by the weight is each shard's own."""

    @staticmethod
    def forward(ctx: Any, ops: AutogradOps, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None,
                outputs: OutputShards) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK, bias_N)
        ctx.pool, ctx.outputs = ops.pool, outputs
        y_TN = ops.base.linear(x_TK.detach(), weight_NK.detach(), _detached(bias_N))
        return y_TN if outputs.spread is None else y_TN.index_select(1, outputs.spread.to(y_TN.device))

    @staticmethod
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK, bias_N = ctx.saved_tensors
        outputs: OutputShards = ctx.outputs
        _, wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad

        def shard(i: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            g_Tn = outputs.take(i, g_TN, 1, outputs.columns)
            g_x = g_Tn @ outputs.take(i, weight_NK, 0, outputs.rows).float() if wants_x else None
            g_weight = (g_Tn.mT @ x_TK).to(weight_NK.dtype) if wants_weight else None
            return g_x, g_weight, g_Tn.mT @ g_Tn.new_ones(len(g_Tn)) if wants_bias else None

        g_x, g_weight, g_bias = zip(*ctx.pool.map(shard, range(len(outputs.rows))))
        return (None, tree(g_x) if wants_x else None,
                outputs.gather_rows(g_weight, weight_NK) if wants_weight else None,
                outputs.gather_rows(g_bias, bias_N) if wants_bias else None, None)


class _RowLinear(Function):
    """Inputs split: both gradients are each shard's own."""

    @staticmethod
    def forward(ctx: Any, ops: AutogradOps, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None,
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


def _sum_rows(g_TN: Tensor, ops: AutogradOps) -> Tensor:
    """The sum over T: each row shard's, then a tree."""
    cuts = row_bounds(len(g_TN), ops.row_shards)

    def shard(cut: tuple[int, int]) -> Tensor:
        rows_RN = g_TN[slice(*cut)].clone()
        return rows_RN.mT @ rows_RN.new_ones(len(rows_RN))

    return tree(ops.pool.map(shard, pairwise(cuts)))


def row_bounds(rows: int, shards: int) -> tuple[int, ...]:
    """Offsets of row shards: equal ones, the last ones shorter or empty."""
    each = -(-rows // shards)
    return tuple(min(rows, i * each) for i in range(shards + 1))


def _rms_norm_backward(g_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(gradient by x, gradient by weight) of x · r · weight with r = rsqrt(mean(x²) + eps)."""
    r_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
    normed_TD = x_TD * r_T1
    g_weight = (g_TD * normed_TD).flatten(0, -2).sum(0)
    g_normed = g_TD * weight_D.float()
    along_T1 = (g_normed * normed_TD).mean(-1, keepdim=True)
    return torch.addcmul(g_normed, normed_TD, along_T1, value=-1).mul_(r_T1), g_weight.to(weight_D.dtype)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_TD, weight_D)
        ctx.eps = eps
        return ops.rms_norm(x_TD.detach(), weight_D.detach(), eps)

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D = ctx.saved_tensors
        return None, *_rms_norm_backward(g_TD, x_TD, weight_D, ctx.eps), None


class _AddRMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor,
                eps: float) -> tuple[Tensor, Tensor]:
        normed_TD, sum_TD = ops.add_rms_norm(x_TD.detach(), residual_TD.detach(), weight_D.detach(), eps)
        ctx.save_for_backward(sum_TD, weight_D)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return normed_TD, sum_TD

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor | None, g_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        if g_TD is None:
            return None, g_sum, g_sum, None, None
        sum_TD, weight_D = ctx.saved_tensors
        g_x, g_weight = _rms_norm_backward(g_TD, sum_TD, weight_D, ctx.eps)
        g_x = g_x if g_sum is None else g_x.add_(g_sum)
        return None, g_x, g_x, g_weight, None


class _Rotary(Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, x_THd: Tensor, positions_T: Tensor, table_Pd: Tensor,
                weight_d: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(*((x_THd, weight_d) if weight_d is not None else ()), positions_T)
        ctx.table_Pd, ctx.eps = table_Pd, eps
        return ops.rotary(x_THd.detach(), positions_T, table_Pd, _detached(weight_d), eps)

    @staticmethod
    def backward(ctx: Any, g_THd: Tensor) -> tuple[Tensor | None, ...]:
        *normed, positions_T = ctx.saved_tensors
        cos, sin = ctx.table_Pd[positions_T.long()].unsqueeze(1).chunk(2, -1)
        low, high = g_THd.chunk(2, -1)
        g_x, half = torch.empty_like(g_THd, memory_format=torch.contiguous_format), low.shape[-1]
        # The transposed rotation.
        torch.mul(low, cos, out=g_x[..., :half]).addcmul_(high, sin)
        torch.mul(high, cos, out=g_x[..., half:]).addcmul_(low, sin, value=-1)
        if not normed:
            return None, g_x, None, None, None, None
        g_x, g_weight = _rms_norm_backward(g_x, normed[0], normed[1], ctx.eps)
        return None, g_x, None, None, g_weight, None


class _SiluMul(Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, gate_up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TI)
        return ops.silu_mul(gate_up_TI.detach())

    @staticmethod
    def backward(ctx: Any, g_TI: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up_TI,) = ctx.saved_tensors
        gate, up = gate_up_TI.chunk(2, -1)
        half = gate.shape[-1]
        g_gate_up = torch.empty_like(gate_up_TI)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        torch.mul(g_TI, silu, out=g_gate_up[..., half:])
        # d silu = sigmoid + silu · (1 − sigmoid)
        slope = sigmoid.addcmul_(silu, 1 - sigmoid)
        torch.mul(g_TI, up, out=g_gate_up[..., :half]).mul_(slope)
        return None, g_gate_up


class _LogProbability(Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, logits_RV: Tensor, targets_R: Tensor, bounds: Sequence[int]) -> Tensor:
        logits_RV = logits_RV.detach()
        lse_R = ops.logsumexp(logits_RV, bounds)
        ctx.save_for_backward(logits_RV, lse_R, targets_R)
        return ops.score(logits_RV, lse_R, targets_R)[0]

    @staticmethod
    def backward(ctx: Any, g_R: Tensor) -> tuple[Tensor | None, ...]:
        logits_RV, lse_R, targets_R = ctx.saved_tensors
        g_logits = (logits_RV - lse_R[:, None]).exp_().mul_(-g_R[:, None])
        g_logits.scatter_add_(1, targets_R.long()[:, None], g_R[:, None])
        return None, g_logits, None, None


class _CausalAttention(Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, meta: AttentionMeta,
                block_size: int, cache_dtype: torch.dtype, scale: float, window: int) -> Tensor:
        q_THd, k_TGd, v_TGd = q_THd.detach(), k_TGd.detach(), v_TGd.detach()
        num_blocks = int(meta.block_table_SM.max()) + 1
        shape = (num_blocks, 1, 2, k_TGd.shape[1], block_size, k_TGd.shape[2])
        blocks = torch.empty(shape, dtype=cache_dtype, device=q_THd.device)
        ops.store_kv_(k_TGd, v_TGd, blocks, 0, meta.slots_T)
        ctx.save_for_backward(q_THd, k_TGd, v_TGd)
        ctx.meta, ctx.cache_dtype, ctx.scale, ctx.window = meta, cache_dtype, scale, window
        return ops.attention(q_THd, blocks, 0, meta, scale, window)

    @staticmethod
    def backward(ctx: Any, g_THd: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_TGd, v_TGd = ctx.saved_tensors
        k_TGd, v_TGd = (x.to(ctx.cache_dtype).float() for x in (k_TGd, v_TGd))
        grads = tuple(torch.empty(x.shape, device=x.device) for x in (q_THd, k_TGd, v_TGd))
        starts = tuple(ctx.meta.query_start_S1.tolist())
        for group in _groups(starts, q_THd.device):
            parts = group.attention_gradients(q_THd, k_TGd, v_TGd, g_THd, ctx.scale, ctx.window)
            for grad, part in zip(grads, parts):
                grad[group.row_R] = part.flatten(0, 1)[group.place_R]
        return None, *grads, None, None, None, None, None


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
        q, k, v = dense = [x[self.row_SL].transpose(1, 2).requires_grad_() for x in (q_THd, k_TGd, v_TGd)]
        g_SHLd = (g_THd[self.row_SL] * self.real_SL[..., None, None]).transpose(1, 2)
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
