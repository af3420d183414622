"""A call for each half block on every rank: the bits of the single operations, and of one rank."""

import pytest

from parallel.rank_kit import run_ranks

MODELS = {
    "llama": {},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "shared-kv": {"num_kv_heads": 2, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", MODELS)
def test_half_blocks_have_the_bits_of_single_operations_and_of_one_rank(name):
    [[alone, by_op]] = run_ranks("parallel.layer_jobs:blocks", 1, MODELS[name])
    assert alone == by_op
    for size in (2, 4):
        for one_call, op_by_op in run_ranks("parallel.layer_jobs:blocks", size, MODELS[name]):
            assert one_call == op_by_op == alone
