"""Attention of whole sequences: the context of training and of scoring a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.attention.context import PagedLayers, packed_meta
from headrace.config import ModelConfig
from headrace.kernels.ops import Ops

__all__ = ["DenseContext"]


class DenseContext:
    """Sequences of `lengths` tokens, packed, each from position 0. An `AttentionContext`, differentiable.

    It attends through a paged cache that exists for one call, so k and v are rounded to `cache_dtype` and sums have
    the shape that serving uses: the trainer's logits equal the engine's bit for bit, at any `block_size`.
    """

    __slots__ = ("block_size", "cache_dtype", "layers", "meta", "ops", "scale", "windows")

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        lengths: Sequence[int],
        cache_dtype: torch.dtype = torch.float32,
        block_size: int = 16,
    ) -> None:
        self.ops = ops
        self.layers: PagedLayers | None = None
        self.meta = packed_meta(lengths, block_size, ops.device)
        self.cache_dtype = cache_dtype
        self.block_size = block_size
        self.scale = config.head_dim**-0.5
        self.windows = [config.window(layer) for layer in range(config.num_layers)]

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """Attend causally within each sequence: [T, H, d] fp32."""
        return self.ops.causal_attention(
            q_THd, k_TGd, v_TGd, self.meta, self.block_size, self.cache_dtype, self.scale, self.windows[layer]
        )
