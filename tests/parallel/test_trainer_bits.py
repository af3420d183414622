"""The trainer's whole curve, weights included: the same bits at tensor parallelism 1, 2 and 4, and for any copies."""

import pytest

from headrace.kernels.load import load_ops
from headrace.model.huggingface import load_model
from parallel.model_jobs import digest
from parallel.rank_kit import run_mesh

STEPS = 20
RECIPE = """
[model]
architecture = "Qwen3ForCausalLM"
hidden_size = 40
intermediate_size = 100
num_layers = 2
num_heads = 4
num_kv_heads = 2
head_dim = 12
max_position_embeddings = 96
tie_word_embeddings = true
qk_norm = true

[data]
vocab_size = 320

[optimizer]
learning_rate = 1e-2
warmup_steps = 2

[train]
steps = 20
batch_size = 4
seq_length = 80
init_std = 0.1
"""
CURVE = "parallel.trainer_jobs:curve"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(RECIPE)
    return str(file)


def assert_same(answers, expected):
    for answer in answers:
        assert answer["curve"] == expected["curve"]
        assert answer["held out"] == expected["held out"]
        assert answer["weights"].items() <= expected["weights"].items()
    assert set().union(*(answer["weights"] for answer in answers)) == set(expected["weights"])


@pytest.fixture(
    scope="module",
    params=[
        [],
        ["model.dtype=bfloat16", "model.num_kv_heads=1"],
        ["model.dtype=float16", "train.loss_scale=16777216", "train.recompute=full", "model.tie_word_embeddings=false"],
    ],
    ids=["fp32", "bf16", "fp16"],
)
def alone(request, recipe):
    return request.param, run_mesh(CURVE, 1, 1, recipe, request.param, STEPS)[0]


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallelism_changes_no_bit_of_training(alone, recipe, size):
    changes, expected = alone
    assert expected["curve"][-1][0] < 0.8 * expected["curve"][0][0]
    assert_same(run_mesh(CURVE, size, size, recipe, changes, STEPS), expected)


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_copies_of_the_model_add_up_in_one_tree(recipe, sequence):
    """Four parts of a batch: computed one after another, by two copies, by four, by two copies of two ranks."""
    expected = run_mesh(CURVE, 1, 1, recipe, ["train.micro_batches=4"], 6)[0]
    for size, tensor in ((2, 1), (4, 1), (4, 2)):
        changes = ["train.micro_batches=4", f"parallel.tensor={tensor}"]
        assert_same(run_mesh(CURVE, size, tensor, recipe, changes, 6, sequence=sequence), expected)


DROPOUT = [
    "model.dropout=0.2",
    "model.qkv_bias=true",
    "model.o_bias=true",
    "model.mlp_bias=true",
    "train.micro_batches=4",
]


@pytest.fixture(scope="module")
def dropped(recipe):
    return run_mesh(CURVE, 1, 1, recipe, DROPOUT, 4)[0]


@pytest.mark.parametrize(
    ("size", "tensor", "sequence", "recompute"),
    [
        (2, 2, False, "none"),
        (2, 2, True, "selective"),
        (4, 4, False, "full"),
        (4, 4, True, "full"),
        (4, 1, False, "none"),
        (4, 2, False, "selective"),
        (4, 2, True, "none"),
    ],
)
def test_dropout_drops_the_same_whichever_rank_has_the_rows(recipe, dropped, size, tensor, sequence, recompute):
    changes = [*DROPOUT, f"parallel.tensor={tensor}", f"train.recompute={recompute}"]
    assert_same(run_mesh(CURVE, size, tensor, recipe, changes, 4, sequence=sequence), dropped)


def test_rows_that_are_numbered_from_a_rank_s_first_are_noticed(recipe, dropped):
    answers = run_mesh("parallel.trainer_jobs:every_rank_drops_alike", 2, 2, recipe, DROPOUT, 1, sequence=True)
    assert all(answer["curve"][0] != dropped["curve"][0] for answer in answers)


def test_a_folder_is_whole_whichever_rank_held_its_parts(recipe, tmp_path):
    expected = run_mesh("parallel.trainer_jobs:export", 1, 1, recipe, [], str(tmp_path / "1"))[0]
    run_mesh("parallel.trainer_jobs:export", 4, 4, recipe, [], str(tmp_path / "4"))
    for folder in ("1", "4"):
        model = load_model(tmp_path / folder, load_ops("reference"))
        got = {f"{name} {i}": digest(view) for name, piece in model.tensors() for i, view in piece.shards(piece.tensor)}
        assert got == expected
    names = {file.name for file in (tmp_path / "1").iterdir()}
    assert names == {file.name for file in (tmp_path / "4").iterdir()}
