"""Dropout: where it drops, how much, by which numbers; and that nobody but a training step drops anything."""

import dataclasses
import json

import pytest
import torch

from headrace.kernels.delegate import DelegatingOps
from headrace.kernels.load import load_ops
from headrace.model.huggingface import check_weights, load_model
from headrace.train import dropout
from headrace.train.config import load_recipe
from headrace.train.run import train
from headrace.train.trainer import Trainer

RATE = 0.3


@pytest.fixture
def load(recipe_file):
    return lambda *changes: load_recipe(recipe_file, [f"model.dropout={RATE}", *changes])


class Watched(DelegatingOps):
    """Remembers which elements were kept, call by call: forward's, and backward's in their turn."""

    def __init__(self, base):
        super().__init__(base)
        self.kept = []

    def dropout(self, x_TD, key, row_T, first_feature, rate):
        self.kept.append(self.base.dropout(torch.ones_like(x_TD), key, row_T, first_feature, rate) != 0)
        return self.base.dropout(x_TD, key, row_T, first_feature, rate)


def watched_step(recipe, ops):
    ops = Watched(ops)
    trainer = Trainer(recipe, ops)
    trainer.step()
    return ops.kept


def steps(recipe, ops, count=3):
    trainer = Trainer(recipe, ops)
    return [dataclasses.astuple(trainer.step()) for _ in range(count)], [p.detach().clone() for p in trainer.parameters]


def equal(first, second):
    return first[0] == second[0] and all(map(torch.equal, first[1], second[1]))


def test_what_joins_the_stream_is_dropped_and_its_gradient_alike(load, cpu_ops):
    """The embedding and two parts a layer, each by a mask of its own; backward takes them the other way round."""
    kept = watched_step(load(), cpu_ops)
    forward, backward = kept[:5], kept[5:]
    assert len(backward) == 5 and all(map(torch.equal, forward, reversed(backward)))
    assert not any(torch.equal(a, b) for a, b in zip(forward, forward[1:]))
    elements = sum(mask.numel() for mask in forward)
    share = sum(int((~mask).sum()) for mask in forward) / elements
    assert abs(share - RATE) < 5 * (RATE * (1 - RATE) / elements) ** 0.5


def test_recomputation_stops_before_a_block_s_last_sum(load, cpu_ops):
    """Beside 5 places forward and 5 back, attention's is repeated in two blocks: of the MLP's, nothing is needed."""
    assert len(watched_step(load("train.recompute=full"), cpu_ops)) == 12


def test_masks_depend_on_seed_step_and_place(load, cpu_ops):
    x_TD, row_T, drawn = torch.ones(64, 32), torch.arange(64), []
    for seed, step in ((0, 1), (0, 2), (1, 1)):
        trainer = Trainer(load(f"train.seed={seed}"), cpu_ops)
        block = trainer.model.blocks[0]
        places = (trainer.model.embed, block.attention.out, block.mlp.down, trainer.model.blocks[1].mlp.down)
        with trainer._dropout.during(step, row_T):
            drawn += [place.after(x_TD) for place in places]
        assert all(place.after(x_TD) is x_TD for place in places)
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("parts", [2, 4])
def test_a_micro_batch_drops_what_the_whole_batch_would(load, cpu_ops, parts):
    changes = ("train.batch_size=4", "optimizer.grad_clip=0")
    whole, cut = (Trainer(load(*changes, f"train.micro_batches={n}"), cpu_ops).step() for n in (1, parts))
    assert whole.loss == cut.loss and whole.grad_norm == pytest.approx(cut.grad_norm, rel=1e-5)


def test_numbers_that_begin_anew_with_each_micro_batch_are_noticed(load, cpu_ops, monkeypatch):
    monkeypatch.setattr(dropout, "_own_rows", lambda tokens_T, group: torch.arange(len(tokens_T)))
    whole, cut = (Trainer(load("train.batch_size=4", f"train.micro_batches={n}"), cpu_ops).step() for n in (1, 4))
    assert whole.loss != cut.loss


@pytest.mark.parametrize("change", ["train.recompute=selective", "train.recompute=full", "threads"])
def test_recomputation_and_threads_change_no_bit(load, cpu_ops, change):
    expected = steps(load("train.micro_batches=2"), cpu_ops)
    changes = () if change == "threads" else (change,)
    assert equal(steps(load("train.micro_batches=2", *changes), load_ops("cpu", threads=1)), expected)


def test_a_recomputation_that_drops_otherwise_is_noticed(load, cpu_ops, monkeypatch):
    """The mutant's keys depend on how often it was asked, as drawn numbers would."""
    expected = steps(load(), cpu_ops, 1)
    asked = iter(range(1000))
    right = dropout._key
    monkeypatch.setattr(dropout, "_key", lambda seed, step, place: right(seed, step, place) + (next(asked) >= 5))
    assert equal(steps(load(), cpu_ops, 1), expected)
    asked = iter(range(1000))
    assert not equal(steps(load("train.recompute=full"), cpu_ops, 1), expected)


def test_a_rate_of_zero_is_no_dropout_to_the_bit(recipe_file, load, cpu_ops):
    plain = steps(load_recipe(recipe_file), cpu_ops)
    assert equal(steps(load("model.dropout=0"), cpu_ops), plain)
    assert not equal(steps(load(), cpu_ops), plain)


def test_only_a_step_drops(recipe_file, load, cpu_ops):
    """Held-out loss, log-probabilities with their gradients, and the engine's twin are those of a model without."""
    trainer, plain = Trainer(load(), cpu_ops), Trainer(load_recipe(recipe_file), cpu_ops)
    trainer.step()
    for ours, theirs in zip(trainer.parameters, plain.parameters, strict=True):
        theirs.data.copy_(ours.detach())
    batch = plain.source.validation(96, 4, 8)[0]
    assert trainer.validation_loss(8) == plain.validation_loss(8)
    got, expected = trainer.log_probabilities(batch), plain.log_probabilities(batch)
    assert torch.equal(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.sum(), trainer.parameters),
        torch.autograd.grad(expected.sum(), plain.parameters),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_reference_kernels_drop_the_same_elements(load, cpu_ops):
    recipe = load()
    for ours, theirs in zip(watched_step(recipe, cpu_ops), watched_step(recipe, load_ops("reference")), strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_that_goes_on_drops_as_if_never_stopped(load, cpu_ops, tmp_path):
    changes = ("train.steps=4", "train.snapshot_every=2", "train.validate_every=2")
    train(load(*changes), tmp_path / "whole", ops=cpu_ops)

    class Killed(Exception):
        pass

    def kill(line):
        if line["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        train(load(*changes), tmp_path / "cut", kill, ops=cpu_ops)
    train(load(*changes), tmp_path / "cut", ops=cpu_ops, resume=True)
    whole, cut = (load_model(tmp_path / name / "hf", cpu_ops) for name in ("whole", "cut"))
    assert all(map(torch.equal, whole.parameters(), cut.parameters()))
    lines = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    record = json.loads((tmp_path / "whole/snapshots/step-00000004/snapshot.json").read_text())
    assert record["recipe"]["model"]["dropout"] == RATE
    check_weights(Trainer(load(), cpu_ops).model, tmp_path / "whole" / "hf")  # a live one may take the folder's weights
    # transformers' attention_dropout is another place; who serves or trains the folder further chooses for himself.
    assert not [key for key in json.loads((tmp_path / "whole/hf/config.json").read_text()) if "dropout" in key]
