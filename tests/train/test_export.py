"""`headrace export`: a snapshot becomes the folder that the run would have left, or nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.cli import main
from headrace.errors import CheckpointError, ConfigError
from headrace.kernels.panels import rows_of
from headrace.model.huggingface import load_model, save_model
from headrace.text.tokenizer import Tokenizer
from headrace.train import export
from headrace.train.config import load_recipe
from headrace.train.export import export_snapshot
from headrace.train.run import train
from parallel.rank_kit import run_mesh

MODELS = {"fp32": ["model.tie_word_embeddings=false"], "bf16": ["model.dtype=bfloat16", "model.num_kv_heads=1"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, recipe_text, cpu_ops):
    """{name: the folder of a run that has left a snapshot and hf/}"""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.toml").write_text(recipe_text)
    for name, changes in MODELS.items():
        recipe = load_recipe(folder / "recipe.toml", [*changes, "train.steps=3", "train.snapshot_every=2"])
        train(recipe, folder / name, ops=cpu_ops)
    return folder


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("inner", ["", "snapshots", "snapshots/step-00000003"])
def test_it_is_the_folder_that_the_run_has_left(runs, tmp_path, cpu_ops, name, inner):
    snapshot = export_snapshot(runs / name / inner, tmp_path / "deep" / "out", cpu_ops, pytest.fail)
    assert snapshot.step == 3
    ours, theirs = (
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in (tmp_path / "deep" / "out", runs / name / "hf")
    )
    assert ours == theirs
    stored = load_file(tmp_path / "deep" / "out" / "model.safetensors")
    wide = torch.bfloat16 if name == "bf16" else torch.float32
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim == 2} == {wide}


def test_an_older_step_has_its_own_weights(runs, tmp_path, cpu_ops):
    export_snapshot(runs / "fp32" / "snapshots" / "step-00000002", tmp_path / "out", cpu_ops, pytest.fail)
    folders = (tmp_path / "out", runs / "fp32" / "hf")
    ours, last = (rows_of(load_model(folder, cpu_ops).lm_head.weight) for folder in folders)
    assert not torch.equal(ours, last)
    tokenizers = [Tokenizer.from_folder(folder) for folder in (tmp_path / "out", runs / "fp32" / "hf")]
    assert tokenizers[0].encode("Mia") == tokenizers[1].encode("Mia")


def test_what_ranks_have_written_is_one_model(tmp_path, cpu_ops, recipe_text):
    """Without the data, from the regions of two ranks: the folder that the trainer saves."""
    (tmp_path / "recipe.toml").write_text(recipe_text)
    run_mesh(
        "train.snapshot_jobs:run",
        2,
        2,
        str(tmp_path / "recipe.toml"),
        [*MODELS["bf16"], "train.steps=2", "parallel.tensor=2"],
        str(tmp_path / "run"),
    )
    export_snapshot(tmp_path / "run", tmp_path / "out", cpu_ops, pytest.fail)
    assert len(list((tmp_path / "run" / "snapshots" / "step-00000002").glob("*.safetensors"))) == 2
    for file in (tmp_path / "run" / "hf").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_that_computes_something_else_is_not_left_behind(runs, tmp_path, cpu_ops, monkeypatch):
    def wrong(model, folder):
        save_model(model, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] *= 1 + 2.0**-20
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(export, "save_model", wrong)
    with pytest.raises(CheckpointError, match=r"would compute other logits than .*step-00000003: nothing was written"):
        export_snapshot(runs / "fp32", tmp_path / "out", cpu_ops, pytest.fail)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_touched(runs, tmp_path, cpu_ops):
    (tmp_path / "empty").mkdir()
    export_snapshot(runs / "fp32", tmp_path / "empty", cpu_ops, pytest.fail)
    for name in ("empty", "file"):
        if name == "file":
            (tmp_path / name).write_text("mine")
        with pytest.raises(ConfigError, match=f"{name} is not an empty folder: give a new one"):
            export_snapshot(runs / "fp32", tmp_path / name, cpu_ops, pytest.fail)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        export_snapshot(runs / "fp32", tmp_path / "file" / "out", cpu_ops, pytest.fail)


def test_a_source_without_a_whole_snapshot_is_refused(runs, tmp_path, cpu_ops):
    shutil.copytree(runs / "fp32" / "snapshots", tmp_path / "snapshots")
    for step in (3, 2):
        (tmp_path / "snapshots" / f"step-{step:08d}" / "rank-00000-of-00001.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step-00000003/rank-.* is damaged"):
        export_snapshot(tmp_path / "snapshots" / "step-00000003", tmp_path / "out", cpu_ops, pytest.fail)
    warnings: list[str] = []
    with pytest.raises(CheckpointError, match="holds no whole snapshot: give a step-… folder"):
        export_snapshot(tmp_path, tmp_path / "out", cpu_ops, warnings.append)
    assert len(warnings) == 2
    with pytest.raises(CheckpointError, match="nowhere holds no whole snapshot"):
        export_snapshot(tmp_path / "nowhere", tmp_path / "out", cpu_ops, pytest.fail)
    assert not (tmp_path / "out").exists()


def test_a_scaled_rotary_table_comes_through_json(runs, tmp_path, cpu_ops):
    """A model that a run has from model.init."""
    folder = tmp_path / "scaled"
    shutil.copytree(runs / "fp32" / "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "recipe.toml").write_text(
        f'[model]\ninit = "{folder}"\n[train]\nsteps = 1\nseq_length = 64\nbatch_size = 1\npeak_flops = 1e11\n'
    )
    train(load_recipe(tmp_path / "recipe.toml"), tmp_path / "run", ops=cpu_ops)
    export_snapshot(tmp_path / "run", tmp_path / "out", cpu_ops, pytest.fail)
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "run" / "hf" / "config.json").read_text()
    assert "linear" in (tmp_path / "out" / "config.json").read_text()


def test_the_command(runs, tmp_path, capsys):
    assert main(["export", str(runs / "bf16"), str(tmp_path / "out")]) == 0
    assert "step-00000003, step 3 → " in capsys.readouterr().out
    assert main(["export", str(runs / "bf16"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"headrace: {tmp_path / 'out'} is not an empty folder: give a new one\n"
    assert main(["generate", str(tmp_path / "out"), "--prompt", "Mia", "--max-tokens", "3"]) == 0
