"""The KV cache's one allocation, and its layout."""

import pytest
import torch

from headrace.attention.store import LAYOUT_VERSION, KVStore
from headrace.errors import ConfigError
from headrace.kernels.load import load_ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_block_is_one_contiguous_range(dtype):
    store = KVStore(5, 3, 2, 8, 16, dtype, "cpu")
    assert LAYOUT_VERSION == 1
    assert store.blocks.shape == (5, 3, 2, 2, 8, 16) and store.blocks.is_contiguous()
    assert store.block_bytes == store.blocks[0].nbytes == KVStore.bytes_per_block(3, 2, 8, 16, dtype)
    assert store.blocks.stride(0) * dtype.itemsize == store.block_bytes
    assert not store.blocks[0].any()


def test_an_element_is_where_the_layout_says():
    store = KVStore(4, 3, 2, 8, 16, torch.float32)
    store.blocks.zero_()
    k, v = torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    load_ops("reference").store_kv_(k, v, store.blocks, 1, torch.tensor([3 * 8 + 5, 8]))
    flat = store.blocks.flatten()
    # block 3, layer 1, value, head 1, token 5
    start = (((3 * 3 + 1) * 2 + 1) * 2 + 1) * 8 * 16 + 5 * 16
    assert torch.equal(flat[start : start + 16], v[0, 1])
    assert torch.equal(store.blocks[1, 1, 0, :, 0], k[1])
    assert store.blocks.count_nonzero() == 4 * 2 * 16


def test_no_memory_is_an_error_with_the_numbers():
    with pytest.raises(ConfigError, match=r"KV cache of 1099511627776 blocks × 1572864 bytes = "):
        KVStore(2**40, 12, 4, 64, 64, torch.float32)


def test_a_store_of_the_null_block_alone_is_refused():
    with pytest.raises(ConfigError, match="num_blocks=1 must be at least 2"):
        KVStore(1, 1, 1, 8, 16, torch.float32)
