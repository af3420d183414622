"""What one rank's trainer really holds: its state, what autograd saves, and the most that is alive in a step."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headrace.kernels.load import load_ops
from headrace.train.config import load_recipe
from headrace.train.data import batch_of
from headrace.train.trainer import Trainer


class Alive(TorchDispatchMode):
    """Counts the bytes of every storage that torch makes, until it is let go."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {self._key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and self._key(x) not in before | self._known:
                storage = x.untyped_storage()
                self._known.add(self._key(x))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, self._key(x), storage.nbytes())
        return out

    @staticmethod
    def _key(x):
        return x.untyped_storage()._cdata

    def _gone(self, key, size):
        self._known.discard(key)
        self.now -= size


def full_batch(recipe):
    """Every row one sequence of `seq_length` tokens, which all count."""
    length = recipe.train.seq_length + 1
    ids = torch.arange(recipe.train.batch_size * length) * 7 % recipe.model.vocab_size
    return batch_of([(row.tolist(), [True] * length) for row in ids.view(-1, length)])


def measured(mesh, file, changes):
    recipe = load_recipe(file, changes)
    trainer = Trainer(recipe, load_ops("cpu", threads=1), mesh)
    batch = full_batch(recipe)
    saved: dict[str, Any] = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in {p.untyped_storage().data_ptr() for p in trainer.parameters}:
            saved.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage())
        return x.detach()  # a node's own output, kept as it is, would keep its node for ever

    part, embed = batch.share(0, trainer._parts), trainer.model.embed
    with saved_tensors_hooks(pack, lambda x: x):
        loss, _ = trainer._loss(part, 1.0)
    kept = sum(storage.nbytes() for storage in saved.values())
    del loss
    saved.clear()
    trainer._gradients(batch, 1.0)
    with Alive() as alive:
        trainer._gradients(batch, 1.0)
    return {
        **trainer.memory(),
        "kept": kept,
        "peak": alive.peak,
        "elsewhere": int(((part.ids_T < embed.start) | (part.ids_T >= embed.stop)).sum()),
    }
