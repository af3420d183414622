"""Loss and every gradient: the same bits at tensor parallelism 1, 2 and 4, with as many messages as the paper says."""

import pytest

from parallel.model_jobs import LENGTHS
from parallel.rank_kit import run_ranks

MODELS = {
    "gqa": {},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": False, "intermediate_size": 100},
    "one kv head": {"num_kv_heads": 1, "tie_word_embeddings": True},
    "all heads": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 8, "vocab_size": 700},
    "bf16": {"dtype": "bfloat16", "tie_word_embeddings": True},
    "window": {"sliding_window": 20, "num_heads": 8, "num_kv_heads": 4, "head_dim": 8},
}
MODULE = "parallel.model_jobs"
JOB = f"{MODULE}:loss_and_gradients"


@pytest.fixture(scope="module", params=MODELS)
def alone(request):
    return MODELS[request.param], run_ranks(JOB, 1, MODELS[request.param])[0]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_the_same_bits(alone, size, sequence):
    changes, expected = alone
    answers = run_ranks(JOB, size, changes, sequence=sequence)
    for answer in answers:
        assert answer["loss"] == expected["loss"] and answer["logprob"] == expected["logprob"]
        wrong = {name for name, bits in answer["gradients"].items() if bits != expected["gradients"][name]}
        assert not wrong
    assert set().union(*(answer["gradients"] for answer in answers)) == set(expected["gradients"])


@pytest.mark.parametrize("size", [2, 4])
def test_the_paper_s_messages(size):
    """2 + 2 all-reduces a layer, of b·s·h elements; one for the embedding, scalars for the loss."""
    layers, message = 2, sum(LENGTHS) * 40
    for answer in run_ranks(JOB, size, {}):
        messages, elements = answer["messages"], answer["elements"]
        assert messages["all_reduce attention"] == messages["all_reduce mlp"] == [layers, layers]
        assert elements["all_reduce attention"] == elements["all_reduce mlp"] == 2 * layers * message
        assert messages["all_reduce embedding"] == [1, 0] and messages["all_reduce head"] == [0, 1]
        assert messages["all_reduce cross_entropy"] == messages["all_gather cross_entropy"] == [1, 0]
        rows = sum(LENGTHS) - 3
        assert elements["all_reduce cross_entropy"] == rows and elements["all_gather cross_entropy"] == 8 * rows
        replicated = "all_reduce kv_gradient" in messages
        assert replicated == (size > 2)
        if replicated:
            assert messages["all_reduce kv_gradient"] == [0, layers]
            assert elements["all_reduce kv_gradient"] == layers * 2 * 16 * 40


def test_sequence_parallel_norms_move_as_much():
    plain = run_ranks(JOB, 2, {})[0]["elements"]
    split = run_ranks(JOB, 2, {}, sequence=True)[0]["elements"]
    for purpose in ("attention", "mlp"):
        assert split[f"reduce_scatter {purpose}"] + split[f"all_gather {purpose}"] == 2 * plain[f"all_reduce {purpose}"]
        assert f"all_reduce {purpose}" not in split


@pytest.mark.parametrize("size", [2, 4])
def test_recomputation_repeats_the_forward_s_sums(size):
    """The paper's 2 more a layer; backward that stops when it has what it needs spares the last one."""
    layers = 2
    whole = f"{MODULE}:recomputed_to_the_end"
    for job, arguments, more in ((JOB, ["full"], (layers, 0)), (whole, [], (layers, layers))):
        for answer in run_ranks(job, size, {}, *arguments):
            for purpose, extra in zip(("attention", "mlp"), more):
                assert answer["messages"][f"all_reduce {purpose}"] == [layers, layers + extra]


@pytest.mark.parametrize(("mutant", "wrong_size"), [("adds_left_to_right", 2), ("rounds_before_it_adds", 2)])
def test_a_mutant_is_noticed(mutant, wrong_size):
    job = f"{MODULE}:{mutant}"
    alone, ranks = run_ranks(job, 1, {})[0], run_ranks(job, wrong_size, {})
    assert any(bits != alone["gradients"][name] for answer in ranks for name, bits in answer["gradients"].items())
