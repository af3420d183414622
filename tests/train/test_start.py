"""Training that starts from a folder: its model, its tokenizer, and what does not fit it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from headrace.errors import CheckpointError, ConfigError
from headrace.model.huggingface import load_model
from headrace.text.tokenizer import Tokenizer
from headrace.train.config import load_recipe
from headrace.train.corpus.build import BuildConfig, build
from headrace.train.run import train
from headrace.train.trainer import Trainer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "finetune.toml"
TINY = (
    "data.source=tinyworld",
    "train.steps=3",
    "train.batch_size=2",
    "train.seq_length=64",
    "train.sample_every=0",
    "optimizer.warmup_steps=1",
)


@pytest.fixture
def load(tinyworld_checkpoint):
    """recipes/finetune.toml on the small model and tinyworld, with changes."""
    return lambda *changes: load_recipe(RECIPE, [f"model.init={tinyworld_checkpoint}", *TINY, *changes])


def test_a_run_starts_from_the_folders_weights(load, tinyworld_checkpoint, cpu_ops, tmp_path):
    recipe = load()
    trainer, folder = Trainer(recipe, cpu_ops), load_model(tinyworld_checkpoint, cpu_ops)
    assert recipe.model.hidden_size == 64 and recipe.data.vocab_size == 512
    for ours, theirs in zip(trainer.parameters, folder.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad
    result = train(recipe, tmp_path / "run", ops=cpu_ops)
    assert result.first_loss < 3.0 and load_model(result.checkpoint, cpu_ops).config.eos_token_ids == (0,)


def test_dtype_and_virtual_shards_are_the_recipes_to_choose(load, tinyworld_checkpoint, cpu_ops):
    trainer = Trainer(load("model.dtype=bfloat16", "model.virtual_shards=2"), cpu_ops)
    folder = load_model(tinyworld_checkpoint, cpu_ops)
    assert trainer.config.shards == 2 and trainer.config.dtype == "bfloat16"
    for ours, theirs in zip(trainer.parameters, folder.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.hidden_size=128", "model.hidden_size=128 differs from 64 of .*model.init starts from: leave it out"),
        (
            "model.architecture=LlamaForCausalLM",
            "model.architecture='LlamaForCausalLM' differs from 'Qwen3ForCausalLM'",
        ),
        ("data.vocab_size=600", "data.vocab_size=600 differs from the 512 tokens"),
        ("data.source=nowhere", "data.source='nowhere'"),
        ("train.seq_length=4096", "max_position_embeddings=512"),
    ],
)
def test_what_the_folder_is_not_is_refused(load, change, message):
    with pytest.raises(ConfigError, match=message):
        load(change)


def test_what_the_folder_is_may_be_said(load):
    assert load("model.hidden_size=64", "data.vocab_size=512").model.num_layers == 2


def test_a_folder_that_is_not_there_is_named(load):
    with pytest.raises(CheckpointError, match="/nowhere/hf"):
        load("model.init=/nowhere/hf")


def test_a_tokenizer_that_is_not_the_datas_is_refused(load, tinyworld_checkpoint, cpu_ops, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tinyworld_checkpoint, other)
    file = json.loads((other / "tokenizer.json").read_text())
    vocab = file["model"]["vocab"]
    first, second = [token for token in vocab if len(token) == 1][:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(file))
    texts = tmp_path / "texts.txt"
    texts.write_text("Once upon a time there was a world, and then there was another. " * 20)
    build(BuildConfig((str(texts),), tmp_path / "data", tokenizer=tinyworld_checkpoint))
    built = f"data.source={tmp_path / 'data'}"
    with pytest.raises(ConfigError, match=r"another tokenizer than that of .*other.*512 tokens.*--tokenizer"):
        Trainer(load(f"model.init={other}", built), cpu_ops)
    file["added_tokens"].append({**file["added_tokens"][0], "id": 512, "content": "<|new|>"})
    (other / "tokenizer.json").write_text(json.dumps(file))
    assert Tokenizer.from_folder(other).vocab_size == 513
    with pytest.raises(ConfigError, match=r"a tokenizer of 512 tokens, .*has one of 513"):
        Trainer(load(f"model.init={other}", built), cpu_ops)


def test_tinyworld_is_read_with_the_folder_s_tokenizer(load, data_dir, cpu_ops):
    """So that any model can be trained further at once."""
    folder = data_dir / "checkpoints" / "stories260K"
    trainer = Trainer(load(f"model.init={folder}"), cpu_ops)
    assert trainer.tokenizer.vocab_size == Tokenizer.from_folder(folder).vocab_size
    assert 0 < trainer.step().loss < 20
