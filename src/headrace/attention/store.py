"""`KVStore`: every block's keys and values, in one allocation."""

from __future__ import annotations

import torch

from headrace.config import require
from headrace.errors import ConfigError

__all__ = ["LAYOUT_VERSION", "KVStore"]

LAYOUT_VERSION = 1
"""The version of the layout that `KVStore` documents. Two processes that exchange raw blocks must agree on it."""


class KVStore:
    """The tensors of the paged KV cache (PagedAttention, section 4.2). `BlockPool` keeps the owners of blocks.

    Layout, version 1: `blocks` is one contiguous tensor

        [block, layer, 2, kv_head, token, dim]

    where index 0 of the third axis is the key, after rotary embedding, and index 1 the value; `token` counts
    from the block's first position. Every element is rounded to the cache dtype when it is written. One block
    over all layers is thus one contiguous range of `block_bytes`, so copy-on-write, swap and transfer are one
    copy each, and a head's tokens lie side by side: attention reads runs of block_size · head_dim elements.

    Block 0 is the *null block*: all zeros, never owned; unused block-table entries point to it. The
    others start uninitialised: a row is always written before it is read.
    """

    def __init__(
        self,
        num_blocks: int,
        num_layers: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises `ConfigError` with the numbers where there is no memory for `num_blocks` blocks."""
        require(num_blocks >= 2, f"num_blocks={num_blocks} must be at least 2, as block 0 is the null block")
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)
        self.block_bytes = self.bytes_per_block(num_layers, num_kv_heads, block_size, head_dim, dtype)
        try:
            self.blocks = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            raise ConfigError(
                f"no memory for a KV cache of {num_blocks} blocks × {self.block_bytes} bytes = "
                f"{num_blocks * self.block_bytes / 2**30:.1f} GiB on {device}: ask for less"
            ) from error
        self.blocks[0].zero_()

    @staticmethod
    def bytes_per_block(num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block of `block_size` tokens over all layers."""
        return num_layers * 2 * num_kv_heads * block_size * head_dim * dtype.itemsize
