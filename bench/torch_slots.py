"""torch's own linear and scaled-dot-product attention in our kernel slots, to measure the cost of the same bits.

The rest of the engine stays. Linears run MKL's fp32 product; attention gathers each sequence's keys and values
through its block table and calls SDPA. Then the bits depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.cpu import CpuOps
from headrace.kernels.layers import LayerForm, LayerWeights
from headrace.kernels.ops import AttentionMeta
from headrace.kernels.panels import Weight, rows_of

__all__ = ["TorchSlots"]


class TorchSlots(CpuOps):
    """`CpuOps` with two slots swapped."""

    name = "torch-slots"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        torch.set_num_threads(threads)

    def layers(self, form: LayerForm, weights: Sequence[LayerWeights]) -> None:
        """Block by block: the one call has no slots."""

    def linear(
        self, x_TK: Tensor, weight_NK: Weight, bias_N: Tensor | None = None, bounds: Sequence[int] | None = None
    ) -> Tensor:
        return F.linear(x_TK, rows_of(weight_NK), bias_N)

    def attention(
        self,
        q_THd: Tensor,
        blocks: Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        window: int = 0,
        lse_TH: Tensor | None = None,
    ) -> Tensor:
        assert lse_TH is None, "only training asks for the log-sum-exp"
        out = torch.empty_like(q_THd)
        size, group = blocks.shape[4], q_THd.shape[1] // blocks.shape[3]
        starts, contexts = meta.query_start_S1.tolist(), meta.context_len_S.tolist()
        for s, context in enumerate(contexts):
            begin, end = starts[s], starts[s + 1]
            table = meta.block_table_SM[s, : -(-context // size)].long()
            kv = blocks[table, layer].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
            mask = None
            if end - begin > 1:
                mask = torch.ones(end - begin, context, dtype=torch.bool).tril(context - (end - begin))
            attended = F.scaled_dot_product_attention(
                q_THd[begin:end].transpose(0, 1)[None],
                kv[0][None],
                kv[1][None],
                attn_mask=mask,
                scale=scale,
                enable_gqa=group > 1,
            )
            out[begin:end] = attended[0].transpose(0, 1)
        return out
