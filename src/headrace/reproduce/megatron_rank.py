"""One rank of `headrace reproduce megatron`: it joins the others, trains a small model, and prints its report.

python -m headrace.reproduce.megatron_rank '{"rank": 0, "size": 2, "tensor": 2, "port": …, "setting": {…}}'
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from headrace.attention.dense import DenseContext
from headrace.config import ModelConfig
from headrace.kernels.autograd import AutogradOps
from headrace.kernels.delegate import DelegatingOps
from headrace.kernels.ops import Ops, load_ops
from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup
from headrace.parallel.mesh import Mesh
from headrace.parallel.pieces import in_place_of
from headrace.parallel.rendezvous import join
from headrace.train.config import DataConfig, OptimizerConfig, Recipe, TrainConfig
from headrace.train.data import TrainingBatch, open_source
from headrace.train.flops import model_flops
from headrace.train.recompute import recompute_
from headrace.train.trainer import Trainer

__all__ = ["RATE", "TIMEOUT", "main", "recipe"]

TIMEOUT = 300.0
RATE = 0.1
"""The paper's dropout rate."""
WAYS = {"none": ("none", True), "full": ("full", True), "full, to the end": ("full", False)}
"""By name: (train.recompute, whether recomputation stops when backward has what it needs)."""
LINK_SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20)
REPEATS = 7


def recipe(setting: dict[str, int]) -> Recipe:
    """The small model and its data; `setting` has layers, width, steps, rows and seq_length."""
    width, vocabulary = setting["width"], 512
    model = ModelConfig(
        "LlamaForCausalLM", vocabulary, width, 3 * width, setting["layers"], 4, 4, width // 4, setting["seq_length"]
    )
    train = TrainConfig(setting["steps"], batch_size=setting["rows"], seq_length=setting["seq_length"], micro_batches=2)
    return Recipe(model, DataConfig(vocab_size=vocabulary), train, OptimizerConfig(learning_rate=3e-3))


def main(text: str) -> None:
    """Do one rank's part and print it as JSON."""
    torch.set_num_threads(1)
    job = json.loads(text)
    rank, size = job["rank"], job["size"]
    place = torch.device("cpu")
    mesh = (
        Mesh()
        if size == 1
        else Mesh.meet(join(job["port"], size, TIMEOUT), rank, size, job["tensor"], place, timeout=TIMEOUT)
    )
    plan = recipe(job["setting"])
    ops = load_ops("cpu", threads=1)
    seen: dict[str, Any] = {"curve": _curve(plan, mesh, ops), "dropout": _dropout(plan, mesh, ops)}
    if mesh.data.size == 1:
        seen |= _passes(plan, mesh.tensor)
        seen["link"] = _link(mesh.tensor) if size == 2 else []
    print(json.dumps(seen))
    mesh.close()


class _Watched(DelegatingOps):
    """Records the mask of every dropout call, recomputed ones included."""

    def __init__(self, base: Ops) -> None:
        super().__init__(base)
        self.masks: list[str] = []
        self.dropped = self.elements = 0

    def dropout(self, x_TD: Tensor, key: int, row_T: Tensor, first_feature: int, rate: float) -> Tensor:
        zero_TD = self.base.dropout(torch.ones_like(x_TD), key, row_T, first_feature, rate) == 0
        self.masks.append(_digest(zero_TD))
        self.dropped, self.elements = self.dropped + int(zero_TD.sum()), self.elements + zero_TD.numel()
        return self.base.dropout(x_TD, key, row_T, first_feature, rate)


def _dropout(plan: Recipe, mesh: Mesh, ops: Ops) -> dict[str, Any]:
    """`_curve` with dropout, and the masks."""
    watched: Any = _Watched(ops)
    curve = _curve(replace(plan, model=replace(plan.model, dropout=RATE)), mesh, watched)
    return curve | {"masks": watched.masks, "share": watched.dropped / watched.elements}


def _curve(plan: Recipe, mesh: Mesh, ops: Ops) -> dict[str, Any]:
    """Every step's loss and gradient norm, and the weights at the end."""
    trainer = Trainer(plan, ops, mesh)
    records = [trainer.step() for _ in range(plan.train.steps)]
    return {
        "steps": [[record.loss, record.grad_norm] for record in records],
        "weights": _digests(trainer.model, trainer.parameters),
    }


def _passes(plan: Recipe, group: RankGroup) -> dict[str, Any]:
    """One forward and backward of a whole batch under every kind of recomputation: bits, messages and time."""
    batch = open_source(plan.data).stream(plan.train.batch_size, plan.train.seq_length).next()
    seen: dict[str, Any] = {"tokens": batch.num_tokens, "targets": len(batch.rows_R), "counted": {}}
    for name, (recompute, early) in WAYS.items():
        model = _build(plan, group, recompute)
        if not seen["counted"]:
            attention: Any = model.blocks[0].attention
            seen |= {
                "start": _digests(model, list(model.parameters())),
                "spread": float(attention.out.weight.detach().std() / attention.qkv.weight.detach().std()),
            }
        group.traffic.clear()
        with set_checkpoint_early_stop(early):
            loss = _loss(model, batch)
            forward = dict(group.traffic.messages)
            grads = torch.autograd.grad(loss, list(model.parameters()))
        seen["counted"][name] = {
            purpose: [
                forward.get(("all_reduce", purpose), 0),
                group.traffic.messages["all_reduce", purpose] - forward.get(("all_reduce", purpose), 0),
                group.traffic.elements["all_reduce", purpose],
                group.traffic.volume(purpose),
            ]
            for purpose in ("attention", "mlp")
        }
        if name == "none":
            report = {" ".join(key): n for key, n in group.traffic.elements.items()}
            seen |= {"loss": loss.item(), "gradients": _digests(model, grads), "elements": report}
    return seen | _timed(_build(plan, group, "none"), batch, group)


def _build(plan: Recipe, group: RankGroup, recompute: str) -> Transformer:
    shards = plan.model.shards
    ops = AutogradOps(load_ops("cpu", threads=1), shards // group.size, shards)
    model = Transformer(plan.model, ops, group=group)
    model.init_weights(plan.train.seed, plan.train.init_std)
    recompute_(model, recompute)
    return model


def _loss(model: Transformer, batch: TrainingBatch) -> Tensor:
    hidden = model.hidden(batch.ids_T, batch.positions_T, DenseContext(model.ops, model.config, batch.lengths))
    weight_R = torch.full((len(batch.rows_R),), 1 / len(batch.rows_R))
    return model.lm_head.loss(model.ops.embedding(batch.rows_R, hidden), batch.targets_R, weight_R)[0]


def _timed(model: Transformer, batch: TrainingBatch, group: RankGroup) -> dict[str, Any]:
    """Seconds, operations, messages and bytes sent of forward and backward."""
    seconds = []
    for _ in range(REPEATS):
        group.barrier()
        group.traffic.clear()
        began = time.perf_counter()
        torch.autograd.grad(_loss(model, batch), list(model.parameters()))
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(seconds),
        "flops": model_flops(model, batch),
        "messages": group.traffic.messages.total(),
        "sent": group.traffic.bytes_sent,
    }


def _link(group: RankGroup) -> list[list[float]]:
    """[bytes that this rank sends, seconds] of all-reduces of several sizes."""
    seen = []
    for size in LINK_SIZES:
        seconds = []
        for _ in range(REPEATS):
            x = torch.ones(size)
            group.barrier()
            group.traffic.clear()
            began = time.perf_counter()
            group.all_reduce(x, "link")
            seconds.append(time.perf_counter() - began)
        seen.append([float(group.traffic.bytes_sent), statistics.median(seconds)])
    return seen


def _digests(model: Transformer, tensors: Sequence[Tensor]) -> dict[str, str]:
    """{checkpoint name and virtual shard: digest} of `tensors`, which are in the order of the parameters."""
    pieces = in_place_of(model.tensors(), list(model.parameters()), [x.detach() for x in tensors])
    return {
        f"{name} {shard}": _digest(view)
        for name, piece in pieces
        for shard, view in piece.shards(piece.tensor)
        if math.prod(view.shape)
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    main(sys.argv[1])
