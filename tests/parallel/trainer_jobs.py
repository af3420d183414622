"""A few steps of a real trainer on one rank of a mesh."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from headrace.kernels.load import load_ops
from headrace.train import dropout
from headrace.train.config import load_recipe
from headrace.train.trainer import Trainer
from parallel.model_jobs import digest


def trainer_of(mesh, recipe, changes):
    ops = load_ops("cpu", threads=1 if mesh.size > 1 else 2)
    return Trainer(load_recipe(recipe, changes), ops, mesh)


def digests(trainer):
    return {
        f"{name} {shard}": digest(view)
        for name, piece in trainer.model.tensors()
        for shard, view in piece.shards(piece.tensor)
    }


def curve(mesh, recipe, changes, steps):
    """Every step's loss and gradient norm, the held-out loss, and the weights at the end."""
    trainer = trainer_of(mesh, recipe, changes)
    records = [trainer.step() for _ in range(steps)]
    return {
        "curve": [[r.loss, r.grad_norm, r.lr, r.tokens, r.flops, r.loss_scale, r.skipped] for r in records],
        "held out": trainer.validation_loss(20),
        "weights": digests(trainer),
    }


def every_rank_drops_alike(mesh, recipe, changes, steps):
    """A wrong trainer: ranks that have some of the rows drop as if they were the first ones."""
    with mock.patch.object(dropout, "_own_rows", lambda tokens_T, group: tokens_T[: len(tokens_T) // group.size]):
        return curve(mesh, recipe, changes, steps)


def export(mesh, recipe, changes, folder):
    trainer = trainer_of(mesh, recipe, changes)
    trainer.step()
    trainer.save(Path(folder))
    return digests(trainer)
