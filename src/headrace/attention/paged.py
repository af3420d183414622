"""Attention over the paged cache that requests share: serving's context."""

from __future__ import annotations

from torch import Tensor

from headrace.attention.context import PagedLayers
from headrace.attention.store import KVStore
from headrace.config import ModelConfig
from headrace.kernels.ops import AttentionMeta, Layers, Ops

__all__ = ["PagedContext"]


class PagedContext:
    """One step's rows over `store`, laid out by `meta`. An `AttentionContext`."""

    __slots__ = ("blocks", "layers", "meta", "ops", "scale", "windows")

    def __init__(
        self, ops: Ops, store: KVStore, meta: AttentionMeta, config: ModelConfig, layers: Layers | None = None
    ) -> None:
        """`layers`: the model's blocks as one call."""
        self.ops = ops
        self.blocks = store.blocks
        self.meta = meta
        self.scale = config.head_dim**-0.5
        self.windows = [config.window(layer) for layer in range(config.num_layers)]
        self.layers: PagedLayers | None = None
        if layers is not None:
            self.layers = lambda x_TD, positions_T: layers(x_TD, positions_T, self.blocks, meta, self.scale)

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """Store k and v of every row, rounded to the cache's dtype, then attend: [T, H, d] fp32."""
        self.ops.store_kv_(k_TGd, v_TGd, self.blocks, layer, self.meta.slots_T)
        return self.ops.attention(q_THd, self.blocks, layer, self.meta, self.scale, self.windows[layer])
