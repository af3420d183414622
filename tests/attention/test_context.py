"""Where the rows of packed sequences are, and what the paged context asks of the ops."""

from typing import Any

import pytest
import torch

from headrace.attention.context import packed_meta, packed_positions
from headrace.attention.paged import PagedContext
from headrace.attention.store import KVStore
from headrace.config import ModelConfig
from headrace.errors import ConfigError

CPU = torch.device("cpu")


def test_packed_layout():
    meta = packed_meta([5, 4, 9], 4, CPU)
    assert meta.block_table_SM.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert meta.query_start_S1.tolist() == [0, 5, 9, 18]
    assert meta.context_len_S.tolist() == [5, 4, 9]
    assert meta.slots_T.tolist() == [*range(4, 9), *range(12, 16), *range(16, 25)]
    assert (meta.max_query, meta.max_context) == (9, 9)
    tensors = (meta.block_table_SM, meta.query_start_S1, meta.context_len_S, meta.slots_T)
    assert {t.dtype for t in tensors} == {torch.int32}
    assert packed_positions([3, 1, 2], CPU).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_empty_sequences_are_refused(lengths):
    with pytest.raises(ConfigError, match="must have at least one token"):
        packed_meta(lengths, 4, CPU)


def test_paged_context_stores_then_attends():
    calls = []

    class Ops:
        def store_kv_(self, k, v, blocks, layer, slots):
            calls.append(("store", layer, blocks.shape, slots.tolist()))

        def attention(self, q, blocks, layer, meta, scale, window):
            calls.append(("attend", layer, scale, window))
            return q

    config = ModelConfig(
        "Qwen2ForCausalLM", 100, 64, 128, 2, 4, 2, 16, 128, sliding_window=6, sliding_layers=(False, True)
    )
    ops: Any = Ops()
    ctx = PagedContext(ops, KVStore(3, 2, 2, 4, 16, torch.float32), packed_meta([2], 4, CPU), config)
    q, k = torch.zeros(2, 4, 16), torch.zeros(2, 2, 16)
    for layer in range(2):
        assert ctx.attend(layer, q, k, k) is q
    shape = (3, 2, 2, 2, 4, 16)
    assert calls == [
        ("store", 0, shape, [4, 5]),
        ("attend", 0, 0.25, 0),
        ("store", 1, shape, [4, 5]),
        ("attend", 1, 0.25, 6),
    ]
