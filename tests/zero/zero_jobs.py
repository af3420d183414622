"""What a rank of a ZeRO run holds and says, seen from inside."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import torch

from parallel.trainer_jobs import trainer_of


def _storages(tensors):
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def live(trainer):
    """Bytes of all tensors that are alive now, by whose they are; "rest" belongs to none of the model's states."""
    sharded, optimizer = trainer.sharded, trainer._optimizer
    owners = {
        "weights": sharded.weights.tensors(),
        "gathered weights": list(sharded.weights._gathered.values())
        + [free for arena in sharded.weights._arenas.values() for free in arena._free],
        "gradients": sharded.gradients.tensors(),
        "gradient buckets": [b.buffer for b in sharded.gradients._buckets if b.buffer is not None]
        + [free for arena in sharded.gradients._arenas.values() for free in arena._free],
        "fp32 masters": [m.master for m in optimizer.state if m.stored is not None],
        "optimizer moments": [t for m in optimizer.state for t in (m.first, m.second)],
    }
    whose: dict[Any, str] = {}
    for name, tensors in owners.items():
        for storage in _storages(tensors):
            whose.setdefault(storage, name)
    alive = _storages(t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == "cpu")
    found: Counter[str] = Counter()
    for storage, size in alive.items():
        found[whose.get(storage, "rest")] += size
    return dict(found)


def sampled(mesh, recipe, changes):
    """`live` as it is inside every block, on the way forward and on the way back, and between two steps."""
    gc.collect()  # of the jobs before this one
    trainer = trainer_of(mesh, recipe, changes)
    trainer.step()
    samples: dict[str, list[dict[str, int]]] = {"forward": [], "backward": []}

    def watched(forward):
        def call(*arguments):
            out = forward(*arguments)
            if torch.is_grad_enabled():
                samples["forward"].append(live(trainer))
                out.register_hook(lambda g: samples["backward"].append(live(trainer)))
            return out

        return call

    for layer in (0, len(trainer.model.blocks) // 2, -1):
        mlp = trainer.model.blocks[layer].mlp
        mlp.forward = watched(mlp.forward)
    trainer.step()
    parameters = list(trainer.model.parameters())
    largest = max(sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in trainer.model.blocks)
    return {
        **samples,
        "idle": live(trainer),
        "said": trainer.memory(),
        "block": largest,
        "matrices": sum(p.numel() for p in parameters if p.ndim == 2),
        "vectors": sum(p.numel() for p in parameters if p.ndim == 1),
        "table": trainer.model.lm_head.weight.numel(),
        "width": parameters[0].element_size(),
    }


def volumes(mesh, recipe, changes):
    """The paper's volume of one step between the copies, by purpose, and the bytes that were sent."""
    trainer = trainer_of(mesh, recipe, changes)
    trainer.step()
    mesh.data.traffic.clear()
    mesh.tensor.traffic.clear()
    trainer.step()
    sizes = {unit.name: unit.size for unit in trainer.sharded.units}
    return {
        "gradients": mesh.data.traffic.volume("gradients"),
        "weights": mesh.data.traffic.volume("weights"),
        "sizes": sizes,
        "bytes": mesh.data.traffic.bytes_sent,
        "tensor": mesh.tensor.traffic.volume(),
        "checkpoints": mesh.tensor.traffic.volume("checkpoints"),
    }
