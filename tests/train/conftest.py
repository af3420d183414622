"""A recipe small enough for tests, and how to write one down."""

import pytest

from headrace.kernels.load import load_ops
from headrace.train.config import load_recipe

RECIPE = """
[model]
architecture = "Qwen3ForCausalLM"
hidden_size = 32
intermediate_size = 48
num_layers = 2
num_heads = 4
num_kv_heads = 2
head_dim = 8
max_position_embeddings = 128
tie_word_embeddings = true
qk_norm = true

[data]
vocab_size = 320

[optimizer]
learning_rate = 1e-2
warmup_steps = 2

[train]
steps = 6
batch_size = 2
seq_length = 96
init_std = 0.1
peak_flops = 1e11
"""


@pytest.fixture(scope="session")
def recipe_text():
    return RECIPE


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE)
    return file


@pytest.fixture
def recipe(recipe_file):
    return load_recipe(recipe_file)


@pytest.fixture(scope="session")
def cpu_ops():
    return load_ops("cpu")
