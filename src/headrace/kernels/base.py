"""`BaseOps`: the part of an op set that is made of its other operations, as serving needs it, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.head import head_chunks, log_probabilities
from headrace.kernels.layers import LayerForm, LayerWeights
from headrace.kernels.ops import AttentionMeta, Kernel, Layers, Ops
from headrace.kernels.panels import Weight
from headrace.kernels.shards import OutputShards
from headrace.kernels.vocab import VocabPart

__all__ = ["BaseOps", "LinearKernel", "cache_of"]


@dataclass(slots=True)
class LinearKernel:
    """The default kernel slot: `Ops.linear` of the weight as it is stored."""

    ops: Ops
    weight_NK: Weight
    bias_N: Tensor | None
    bounds: tuple[int, ...] | None

    def __call__(self, x_TK: Tensor) -> Tensor:
        """x @ weight.T + bias, [T, N] fp32."""
        return self.ops.linear(x_TK, self.weight_NK, self.bias_N, self.bounds)


class BaseOps:
    """The base of every op set. See `headrace.kernels.ops.Ops` for what each method promises."""

    columns_per_shard = False

    def matrix(self: Ops, rows: int, columns: int, dtype: torch.dtype) -> Weight:
        return torch.empty(rows, columns, dtype=dtype, device=self.device)

    def store(self: Ops, rows: int, columns: int, dtype: torch.dtype) -> Weight:
        return self.matrix(rows, columns, dtype)

    def layers(self: Ops, form: LayerForm, weights: Sequence[LayerWeights]) -> Layers | None:
        return None

    def column_kernel(self: Ops, weight_NK: Weight, bias_N: Tensor | None, outputs: OutputShards) -> Kernel:
        return LinearKernel(self, weight_NK, bias_N, None)

    def row_kernel(self: Ops, weight_NK: Weight, bias_N: Tensor | None, bounds: tuple[int, ...]) -> Kernel:
        return LinearKernel(self, weight_NK, bias_N, bounds)

    def add_bias(self, y_TN: Tensor, bias_N: Tensor) -> Tensor:
        return y_TN + bias_N

    def causal_attention(
        self: Ops,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        meta: AttentionMeta,
        block_size: int,
        cache_dtype: torch.dtype,
        scale: float,
        window: int = 0,
    ) -> Tensor:
        blocks = cache_of(self, k_TGd, v_TGd, meta, block_size, cache_dtype)
        return self.attention(q_THd, blocks, 0, meta, scale, window)

    def logsumexp(self: Ops, logits_RV: Tensor, bounds: Sequence[int]) -> Tensor:
        return self.merge_logsumexp(self.logsumexp_parts(logits_RV, bounds))

    def log_probability(self: Ops, logits_RV: Tensor, targets_R: Tensor, part: VocabPart) -> Tensor:
        return log_probabilities(self, logits_RV, targets_R, part)[0]

    def head_loss(
        self: Ops, x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, weight_R: Tensor, part: VocabPart
    ) -> tuple[Tensor, Tensor]:
        logprob_R = torch.empty(len(x_RD), device=x_RD.device)
        for rows, _, logprob_r, _, _ in head_chunks(self, x_RD.detach(), weight_VD.detach(), targets_R, part):
            logprob_R[rows] = logprob_r
        return (logprob_R.double() * weight_R.double()).sum(), logprob_R


def cache_of(
    ops: Ops, k_TGd: Tensor, v_TGd: Tensor, meta: AttentionMeta, block_size: int, dtype: torch.dtype
) -> Tensor:
    """A cache of one layer, [block, 1, 2, G, token, d], with k and v in the slots of `meta`."""
    shape = (int(meta.block_table_SM.max()) + 1, 1, 2, k_TGd.shape[1], block_size, k_TGd.shape[2])
    blocks = torch.empty(shape, dtype=dtype, device=k_TGd.device)
    ops.store_kv_(k_TGd, v_TGd, blocks, 0, meta.slots_T)
    return blocks
