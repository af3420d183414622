"""Recipes: overrides, and one clear line for everything that cannot work."""

from pathlib import Path

import pytest

from headrace.errors import ConfigError
from headrace.train.config import load_recipe
from headrace.train.optimizer import learning_rate

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_recipe_is_valid_and_splits_over_four_ranks():
    recipe = load_recipe(ROOT / "recipes/demo.toml")
    assert recipe.model.num_heads % 4 == 0 and recipe.model.num_kv_heads % 4 == 0
    assert recipe.model.max_position_embeddings >= 256


def test_overrides(recipe_file):
    recipe = load_recipe(recipe_file, ["train.steps=9", "train.learning_rate = 0.5", "model.qk_norm=false",
                                       "train.kernels=reference", "model.sliding_layers=[true, false]",
                                       "model.architecture=MistralForCausalLM", 'train.kv_cache_dtype="bfloat16"'])
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.model.qk_norm) == (9, 0.5, False)
    assert (recipe.train.kernels, recipe.train.kv_cache_dtype) == ("reference", "bfloat16")
    assert recipe.model.sliding_layers == (True, False)


@pytest.mark.parametrize(("override", "message"), [
    ("train.step=9", "train.step does not exist.*batch_size.*warmup_steps"),
    ("model.vocab_size=9", "model.vocab_size does not exist"),
    ("optimizer.lr=1", "'optimizer' is not a section.*model, data, train"),
    ("steps=9", "section.key=value"), ("train.steps", "section.key=value"), (".steps=1", "section.key=value"),
    ("train.steps=0", "train.steps=0 must be an integer of at least 1"), ("train.steps=1.5", "train.steps"),
    ("train.steps=true", "train.steps"), ("train.learning_rate=0", "train.learning_rate"),
    ("train.learning_rate=nan", "train.learning_rate"), ("train.learning_rate=fast", "train.learning_rate"),
    ("train.warmup_steps=7", "warmup_steps=7 is more than train.steps=6"), ("train.beta1=1", "beta1"),
    ("train.grad_clip=-1", "grad_clip"), ("train.seq_length=129", "max_position_embeddings=128"),
    ("data.source=books", "data.source='books' is not one of tinyworld"), ("train.kv_cache_dtype=int8", "kv_cache"),
    ("model.num_heads=3", "num_heads=3"), ("model.num_heads=two", "num_heads='two'"),
    ("model.rms_norm_eps=tiny", "wrong type|rms_norm_eps"),
])
def test_what_cannot_work_is_refused_by_name(recipe_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file, [override])


@pytest.mark.parametrize(("text", "message"), [
    ("[train", "not TOML"), ("train = 3", r"\[train\]"), ("", r"\[model\] lacks architecture"),
    ("[extra]\nx = 1", "'extra' is not a section")])
def test_broken_files(tmp_path, text, message):
    file = tmp_path / "broken.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.toml: cannot be read"):
        load_recipe(tmp_path / "nothing.toml")


def test_the_learning_rate_warms_up_and_falls(recipe_file):
    config = load_recipe(recipe_file, ["train.steps=100", "train.warmup_steps=10", "train.final_lr_ratio=0.2"]).train
    rates = [learning_rate(config, step) for step in range(1, 101)]
    assert rates[0] == config.learning_rate / 10 and rates[9] == config.learning_rate == max(rates)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.2 * config.learning_rate)
