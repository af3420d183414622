"""What sixteen bits round, what stays fp32, and a loss scale that meets real overflows."""

import pytest
import torch

from headrace.errors import ConfigError
from headrace.model.huggingface import load_model
from headrace.train.config import TrainConfig, load_recipe
from headrace.train.run import train
from headrace.train.scaler import LossScale
from headrace.train.trainer import Trainer
from train.run_kit import lines_of

NARROW = ("bfloat16", "float16")


def state_of(trainer):
    return {name: region.tensor.clone() for name, region in trainer.tensors()}


@pytest.mark.parametrize("dtype", NARROW)
def test_weights_and_gradients_are_stored_narrow_and_masters_wide(recipe_file, cpu_ops, dtype):
    trainer = Trainer(load_recipe(recipe_file, [f"model.dtype={dtype}"]), cpu_ops)
    narrow = getattr(torch, dtype)
    batch = trainer.source.validation(96, 2, 8)[0]
    grads = torch.autograd.grad(trainer.log_probabilities(batch).sum(), trainer.parameters)
    for parameter, grad in zip(trainer.parameters, grads):
        assert parameter.dtype == grad.dtype == (narrow if parameter.ndim == 2 else torch.float32)
    trainer.step()
    tensors = {name: region.tensor for name, region in trainer.tensors()}
    masters = {name.removeprefix("master/") for name in tensors if name.startswith("master/")}
    matrices = {name.removeprefix("model/") for name, tensor in tensors.items() if tensor.dtype == narrow}
    assert masters == matrices and len(masters) > 4
    for name in masters:
        master, stored = tensors[f"master/{name}"], tensors[f"model/{name}"]
        assert master.dtype == torch.float32 and torch.equal(master.to(narrow), stored)
        assert not torch.equal(master, stored.float())
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if not name.startswith("model/"))


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_every_precision_learns_about_as_well(recipe_file, cpu_ops, dtype):
    trainer = Trainer(load_recipe(recipe_file, ["train.steps=30", f"model.dtype={dtype}"]), cpu_ops)
    records = [trainer.step() for _ in range(30)]
    assert sum(record.loss for record in records[-5:]) / 5 < 0.7 * records[0].loss
    assert not any(record.skipped for record in records)
    assert {record.loss_scale for record in records} == {2.0**16 if dtype == "float16" else None}


def test_gradients_that_overflow_float16_are_skipped_and_training_recovers(recipe_file, cpu_ops):
    overrides = ["train.steps=60", "model.dtype=float16", f"train.loss_scale={2.0**34}"]
    trainer, skipped = Trainer(load_recipe(recipe_file, overrides), cpu_ops), 0
    while True:
        before, factor = state_of(trainer), trainer.state()["loss_scale"]["value"]
        record = trainer.step()
        assert record.loss_scale == factor == 2.0 ** (34 - skipped)
        after = state_of(trainer)
        if not record.skipped:
            break
        skipped += 1
        assert record.grad_norm is None and trainer.state()["updates"] == 0
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert skipped >= 3 and trainer.state()["updates"] == 1
    assert record.grad_norm is not None and record.grad_norm > 0
    assert not all(torch.equal(before[name], after[name]) for name in before)
    losses = [trainer.step().loss for _ in range(30)]
    assert sum(losses[-5:]) / 5 < 0.7 * record.loss


def test_the_scale_changes_no_bit_where_nothing_over_or_underflows(recipe_file, cpu_ops):
    """A power of two moves exponents only: two scales give the same fp32 parameters' updates, to rounding."""
    runs = [
        Trainer(load_recipe(recipe_file, ["model.dtype=float16", f"train.loss_scale={scale}"]), cpu_ops)
        for scale in (2.0**12, 2.0**13)
    ]
    norms = [trainer.step().grad_norm for trainer in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_scale_grows_and_shrinks():
    scale = LossScale(TrainConfig(steps=1, loss_scale=8.0, loss_scale_steps=3), active=True)
    seen = []
    for finite in (1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0):
        (scale.good if finite else scale.overflow)()
        seen.append(scale.value)
    assert seen == [8, 8, 16, 16, 16, 8, 8, 8, 16, 8, 4, 2, 1]
    with pytest.raises(ConfigError, match="not finite at a loss scale of 1"):
        scale.overflow()
    with pytest.raises(ConfigError, match="gradients are not finite"):
        LossScale(TrainConfig(steps=1), active=False).overflow()


def test_skipped_steps_are_in_the_metrics(recipe_file, tmp_path, cpu_ops):
    recipe = load_recipe(recipe_file, ["model.dtype=float16", f"train.loss_scale={2.0**34}"])
    train(recipe, tmp_path / "run", ops=cpu_ops)
    lines = lines_of(tmp_path / "run")
    assert lines[0]["skipped"] is True and lines[0]["grad_norm"] is None and lines[0]["loss_scale"] == 2.0**34
    assert [line["loss_scale"] for line in lines[:3]] == [2.0**34, 2.0**33, 2.0**32]


@pytest.mark.parametrize("dtype", NARROW)
def test_the_folder_is_written_in_the_dtype_it_was_trained_in(recipe_file, tmp_path, cpu_ops, dtype):
    trainer = Trainer(load_recipe(recipe_file, [f"model.dtype={dtype}"]), cpu_ops)
    trainer.step()
    trainer.save(tmp_path / "hf")
    read = load_model(tmp_path / "hf", cpu_ops)
    assert read.config.dtype == dtype
    for ours, theirs in zip(trainer.parameters, read.parameters(), strict=True):
        assert torch.equal(ours.detach().float(), theirs.float())
