"""`ModelShard`: one rank's part of the model and of the KV cache, and what a step does to both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.attention.context import packed_positions
from headrace.attention.dense import DenseContext
from headrace.attention.paged import PagedContext
from headrace.attention.store import KVStore
from headrace.cache.manager import BlockMoves
from headrace.kernels.ops import AttentionMeta, Ops
from headrace.model.transformer import Transformer

__all__ = ["Inputs", "ModelShard", "kv_block_bytes", "kv_store"]


def kv_block_bytes(model: Transformer, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of a KV block of this rank's part of a model."""
    config = model.config
    return KVStore.bytes_per_block(config.num_layers, model.kv_heads, block_size, config.head_dim, dtype)


def kv_store(model: Transformer, num_blocks: int, block_size: int, dtype: torch.dtype, ops: Ops) -> KVStore:
    """The KV cache of this rank's part of a model."""
    config = model.config
    return KVStore(num_blocks, config.num_layers, model.kv_heads, block_size, config.head_dim, dtype, ops.device)


@dataclass(slots=True)
class Inputs:
    """What the model reads of a step: T tokens, and the R rows that get logits."""

    ids_T: Tensor
    positions_T: Tensor
    meta: AttentionMeta
    rows_R: Tensor
    """Distinct, ascending."""


class ModelShard:
    """Every rank runs the same steps on its own shard; only rank 0 gets whole logits. One thread owns it."""

    def __init__(self, model: Transformer, ops: Ops, store: KVStore, host_slots: int = 0) -> None:
        self.model = model
        self.ops = ops
        self.store = store
        self.layers = model.layers()
        """The model's blocks as one call, where there is one."""
        self._host = torch.empty((host_slots, *store.blocks.shape[1:]), dtype=store.blocks.dtype)

    def move(self, moves: BlockMoves) -> None:
        """Move blocks, in the order of `BlockMoves`."""
        copy, blocks = self.ops.copy_blocks_, self.store.blocks
        if moves.swap_out:
            copy(blocks, self._host, moves.swap_out)
        if moves.swap_in:
            copy(self._host, blocks, moves.swap_in)
        if moves.copies:
            copy(blocks, blocks, moves.copies)

    def logits(self, inputs: Inputs) -> Tensor:
        """Raw logits [R, V] of the rows that need them; also stores the KV of every row."""
        context = PagedContext(self.ops, self.store, inputs.meta, self.model.config, self.layers)
        # Rows are distinct, so as many as there are tokens are all of them, and need no gather.
        rows_R = None if len(inputs.rows_R) == len(inputs.ids_T) else inputs.rows_R
        logits_RV = self.model.forward(inputs.ids_T, inputs.positions_T, context, rows_R)
        return self.model.lm_head.gather(logits_RV)

    @torch.no_grad()
    def hidden(self, ids: Sequence[int]) -> Tensor:
        """The head's input [T, D] fp32 for one sequence, computed without the cache."""
        context = DenseContext(self.ops, self.model.config, [len(ids)], self.store.blocks.dtype)
        return self.model.hidden(
            torch.tensor(ids, device=self.ops.device), packed_positions([len(ids)], self.ops.device), context
        )
