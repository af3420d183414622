"""A model's blocks over a paged cache, op by op or in one call."""

import torch
from torch import Tensor

from headrace.attention.context import packed_meta, packed_positions
from headrace.attention.paged import PagedContext
from headrace.attention.store import KVStore
from headrace.model.transformer import Transformer


def trunk(model: Transformer, lengths: list[int], one_call: bool, cache: torch.dtype) -> list[Tensor]:
    """(x, residual) and the cache as bits."""
    config, device = model.config, torch.device("cpu")
    meta = packed_meta(lengths, 16, device)
    blocks = int(meta.block_table_SM.max()) + 1
    store = KVStore(blocks, config.num_layers, model.kv_heads, 16, config.head_dim, cache, device)
    store.blocks.zero_()
    layers = model.layers() if one_call else None
    assert (layers is not None) == one_call
    context = PagedContext(model.ops, store, meta, config, layers)
    ids = torch.arange(sum(lengths)) * 7 % config.vocab_size
    x, residual = model._trunk(ids, packed_positions(lengths, device), context)
    assert residual is not None
    found = (x, residual, store.blocks)
    return [x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16).clone() for x in found]
