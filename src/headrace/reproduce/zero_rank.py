"""One rank of `headrace reproduce zero`: it trains a small model at every stage and prints bytes held and moved.

python -m headrace.reproduce.zero_rank '{"rank": 0, "size": 2, "tensor": 1, "port": …, "setting": {…}}'
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from typing import Any

import torch

from headrace.kernels.ops import load_ops
from headrace.parallel.mesh import Mesh
from headrace.parallel.rendezvous import join
from headrace.reproduce.megatron_rank import TIMEOUT, recipe
from headrace.train.config import ParallelConfig, Recipe
from headrace.train.plan import STATES
from headrace.train.trainer import Trainer

__all__ = ["main"]


def main(text: str) -> None:
    """Do one rank's part and print it as JSON."""
    torch.set_num_threads(1)
    job = json.loads(text)
    mesh = Mesh.meet(
        join(job["port"], job["size"], TIMEOUT),
        job["rank"],
        job["size"],
        job["tensor"],
        torch.device("cpu"),
        timeout=TIMEOUT,
    )
    plan = recipe(job["setting"])
    plan = replace(plan, train=replace(plan.train, micro_batches=1))
    if job["tensor"] == 1:
        plan = replace(plan, model=replace(plan.model, dtype="bfloat16"))
        stages = [_stage(replace(plan, parallel=ParallelConfig(zero=stage)), mesh) for stage in range(4)]
        print(json.dumps({"parameters": stages[0].pop("parameters"), "stages": stages}))
    else:
        plan = replace(plan, train=replace(plan.train, recompute="full"))
        print(
            json.dumps(
                {
                    name: _stage(replace(plan, parallel=parallel), mesh)
                    for name, parallel in (
                        ("plain", ParallelConfig(tensor=2, offload_activations=True)),
                        ("divided", ParallelConfig(tensor=2, partition_activations=True)),
                    )
                }
            )
        )
    mesh.close()


def _stage(plan: Recipe, mesh: Mesh) -> dict[str, Any]:
    """The report of a run by `plan`, with the traffic of its last step."""
    trainer = Trainer(plan, load_ops("cpu", threads=1), mesh)
    records = []
    for _ in range(plan.train.steps):
        mesh.data.traffic.clear()
        mesh.tensor.traffic.clear()
        records.append(trainer.step())
    traffic, memory = mesh.data.traffic, trainer.memory()
    report = {
        "curve": [[record.loss, record.grad_norm] for record in records],
        "gradients": traffic.volume("gradients"),
        "weights_moved": traffic.volume("weights"),
        "sent": traffic.bytes_sent,
        "tensor": mesh.tensor.traffic.volume(),
        "kept": memory["checkpoints"],
        "states": {kind: memory[kind] for kind in STATES},
        "parameters": sum(unit.size for unit in trainer.sharded.units),
    }
    digest = hashlib.sha256()
    for name, piece in trainer.model.tensors():
        digest.update(name.encode() + piece.tensor.contiguous().view(torch.uint8).numpy().tobytes())
    report["weights"] = digest.hexdigest()
    return report


if __name__ == "__main__":
    main(sys.argv[1])
