"""Recipes: overrides, and one clear line for everything that cannot work."""

from pathlib import Path

import pytest

from headrace.errors import ConfigError
from headrace.train.config import OptimizerConfig, load_recipe
from headrace.train.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_recipe_is_valid_and_splits_over_four_ranks():
    recipe = load_recipe(ROOT / "recipes/demo.toml")
    assert recipe.model.num_heads % 4 == 0 and recipe.model.num_kv_heads % 4 == 0
    assert recipe.model.max_position_embeddings >= 256


def test_overrides(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "train.steps=9",
            "optimizer.learning_rate = 0.5",
            "model.qk_norm=false",
            "train.kernels=reference",
            "model.sliding_layers=[true, false]",
            "model.architecture=MistralForCausalLM",
            'train.kv_cache_dtype="bfloat16"',
        ],
    )
    assert (recipe.train.steps, recipe.optimizer.learning_rate, recipe.model.qk_norm) == (9, 0.5, False)
    assert (recipe.train.kernels, recipe.train.kv_cache_dtype) == ("reference", "bfloat16")
    assert recipe.model.sliding_layers == (True, False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=9", r"train\.stpes does not exist; did you mean train\.steps\?"),
        ("model.vocab_size=9", r"model\.vocab_size does not exist; did you mean data\.vocab_size\?"),
        ("train.learning_rate=1", r"train\.learning_rate does not exist; did you mean optimizer\.learning_rate\?"),
        ("optimizer.grad_clipping=1", r"did you mean optimizer\.grad_clip\?"),
        ("model.intial=x", r"did you mean model\.init\?"),
        ("parallel.tensors=2", r"did you mean parallel\.tensor\?"),
        ("optimiser.eps=1", r"\[optimiser\] is not a section.*did you mean \[optimizer\]\?.*model, data"),
        ("steps=9", "section.key=value"),
        ("train.steps", "section.key=value"),
        (".steps=1", "section.key=value"),
        ("train.steps=0", "train.steps=0 must be an integer of at least 1"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=true", "train.steps"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate"),
        ("optimizer.learning_rate=fast", "learning_rate"),
        ("optimizer.beta1=1", "beta1"),
        ("optimizer.grad_clip=-1", "grad_clip"),
        ("optimizer.schedule=linear", "'linear' is not one of cosine, wsd"),
        ("optimizer.decay_ratio=2", "decay_ratio"),
        ("train.recompute=all", "'all' is not one of none, selective, full"),
        ("train.micro_batches=3", "micro_batches=3 is more than the rows of a batch, train.batch_size=2"),
        ("train.keep_snapshots=0", "keep_snapshots=0"),
        ("train.loss_scale=1000", "power of two"),
        ("train.peak_flops=-1", "peak_flops"),
        ("parallel.tensor=3", "parallel.tensor=3 must be a power of two"),
        ("model.init=7", "model.init=7 must be a string"),
        ("train.seq_length=129", "max_position_embeddings=128"),
        ("data.source=books", "data.source='books' is neither tinyworld nor a folder"),
        ("train.kv_cache_dtype=int8", "kv_cache"),
        ("model.num_heads=3", "num_heads=3"),
        ("model.num_heads=two", "num_heads='two'"),
        ("model.dropout=1", "dropout=1 must be a number, at least 0 and less than 1"),
        ("model.dropout=some", "'some'"),
        ("model.dropout=-0.1", "dropout=-0.1"),
        ("model.dropout=nan", "dropout=nan"),
        ("model.dropout=true", "=True"),
        ("model.rms_norm_eps=tiny", "wrong type|rms_norm_eps"),
    ],
)
def test_what_cannot_work_is_refused_by_name(recipe_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train", "not TOML"),
        ("train = 3", r"\[train\]"),
        ("", r"\[model\] lacks architecture"),
        ("[extra]\nx = 1", r"\[extra\] is not a section"),
    ],
)
def test_broken_files(tmp_path, text, message):
    file = tmp_path / "broken.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.toml: cannot be read"):
        load_recipe(tmp_path / "nothing.toml")


def rates(config, steps):
    return [learning_rate(config, steps, step) for step in range(1, steps + 1)]


def test_the_cosine_warms_up_and_falls():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=10, final_lr_ratio=0.2)
    got = rates(config, 100)
    assert got[0] == 0.05 and got[9] == 0.5 == max(got)
    assert got[9:] == sorted(got[9:], reverse=True)
    assert got[-1] == pytest.approx(0.1)


def test_wsd_warms_up_stays_and_falls():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=10, schedule="wsd", decay_ratio=0.25, final_lr_ratio=0.2)
    got = rates(config, 100)
    assert got[0] == 0.05 and set(got[9:75]) == {0.5}
    falls = [a - b for a, b in zip(got[74:], got[75:])]
    assert falls == pytest.approx([0.4 / 25] * 25) and got[-1] == pytest.approx(0.1)
    assert rates(OptimizerConfig(schedule="wsd", decay_ratio=0.0), 3) == pytest.approx([1e-3, 1e-3, 1e-4])
