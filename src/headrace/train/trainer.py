"""The trainer: one model, one recipe, one step at a time, on the ops that the server uses.

A step: take the next batch · forward, log-probabilities of the targets and backward for every micro-batch · sum the
gradients in a tree · norm and clip · AdamW. A step reads no clock and writes no file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.attention.dense import DenseContext
from headrace.errors import ConfigError
from headrace.kernels.load import load_ops
from headrace.kernels.training import TrainingOps
from headrace.model.huggingface import save_model
from headrace.parallel.group import RankGroup
from headrace.parallel.mesh import Mesh, launched
from headrace.parallel.regions import Region
from headrace.train.config import Recipe
from headrace.train.data import TrainingBatch, open_source
from headrace.train.dropout import Dropout
from headrace.train.flops import model_flops
from headrace.train.optimizer import AdamW, PairwiseSum, ParameterGroup, global_norm
from headrace.train.process import for_kernels, keep_memory
from headrace.train.recompute import recompute_
from headrace.train.scaler import LossScale
from headrace.train.schedule import learning_rate
from headrace.train.start import first_weights, initial_model, initial_tokenizer
from headrace.zero.activations import Checkpoints, keep_checkpoints
from headrace.zero.deferred import DeferredOps
from headrace.zero.memory import Host
from headrace.zero.sharded import Sharded

__all__ = ["StepRecord", "Trainer"]

EMPTY_BATCHES = 1000
"""Batches in a row without a token that counts, after which the data is refused."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The numbers of one step. None depends on the machine's speed."""

    step: int
    loss: float
    """The mean over the step's targets, in nats, unrounded."""
    grad_norm: float | None
    """Before clipping; None where gradients overflowed."""
    lr: float
    tokens: int
    """Tokens of the step's batch."""
    flops: float
    """Operations of forward and backward, see `model_flops`."""
    loss_scale: float | None = None
    """The factor on the loss; None outside of float16."""
    skipped: bool = False
    """Whether the gradients overflowed, so that the step updated nothing."""


class Trainer:
    """Model, data and optimizer of one run. `step()` does one step; `log_probabilities(batch)` is its forward."""

    def __init__(self, recipe: Recipe, ops: TrainingOps | None = None, mesh: Mesh | None = None) -> None:
        """`mesh`: the ranks that train together; None takes the processes of the run, or this one alone."""
        self.mesh = mesh = launched(recipe.parallel.tensor, torch.device("cpu")) if mesh is None else mesh
        self.recipe = recipe
        keep_memory()
        self.source = open_source(recipe.data, initial_tokenizer(recipe))
        self.tokenizer = self.source.tokenizer
        shards = recipe.model.shards
        mesh.tensor.require_shards(shards)
        local = shards // mesh.tensor.size
        self.ops = DeferredOps(
            ops or load_ops(recipe.train.kernels),
            local,
            local if mesh.tensor.sequence else shards,
        )
        self._parts = _parts(recipe, mesh)
        self.model = initial_model(recipe, self.tokenizer, self.ops, mesh.tensor)
        self.config = self.model.config
        self.parameters = list(self.model.parameters())
        self._dropout = Dropout(self.model, self.ops, self.config.dropout, recipe.train.seed)
        parallel = recipe.parallel
        host = Host(self.ops.device, parallel.offload_folder or tempfile.gettempdir())
        self._recompute(host)
        self.sharded = Sharded(
            self.model,
            mesh.data,
            parallel.zero,
            parallel.bucket,
            parallel.overlap,
            parallel.reduce_every == "micro_step",
        )
        with self.sharded.filling():
            first_weights(self.model, recipe)
        slots = self.sharded.slots
        self._optimizer = AdamW(
            [ParameterGroup(slot.weights, slot.unit.matrices) for slot in slots],
            recipe.optimizer,
            self.ops,
            host.zeros if parallel.offload_optimizer else None,
        )
        self.steps = 0
        """Steps done."""
        self._scale = LossScale(recipe.train, active=self.config.dtype == "float16")
        self._stream = self.source.stream(recipe.train.batch_size, recipe.train.seq_length)
        self._held_out: dict[int, list[TrainingBatch]] = {}

    def log_probabilities(self, batch: TrainingBatch) -> Tensor:
        """log p [R] of the batch's targets, with gradients: the bits that the server computes for them."""
        return self.model.lm_head.log_probabilities(self._predicting(batch), batch.targets_R)

    def _predicting(self, batch: TrainingBatch) -> Tensor:
        """The LM head's input [R, D] for the tokens that count."""
        batch = self._padded(batch)
        ctx = DenseContext(self.ops, self.config, batch.lengths, getattr(torch, self.recipe.train.kv_cache_dtype))
        return self.ops.embedding(batch.rows_R, self.model.hidden(batch.ids_T, batch.positions_T, ctx))

    def _padded(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with a sequence of padding that makes T a multiple of V, so that ranks can split the rows.

        It is added at every degree, as the bits of a weight's gradient may depend on the number of rows.
        """
        lack = -batch.num_tokens % self.config.shards
        if not lack:
            return batch
        more_T = torch.arange(lack)
        return dataclasses.replace(
            batch,
            ids_T=torch.cat((batch.ids_T, torch.zeros_like(more_T))),
            lengths=[*batch.lengths, lack],
            positions_T=torch.cat((batch.positions_T, more_T.to(batch.positions_T.dtype))),
            row_of=[*batch.row_of, batch.row_of[-1]],
            tokens_T=torch.cat((batch.tokens_T, more_T)),
        )

    def step(self) -> StepRecord:
        """Do one step. Raises `ConfigError` when the loss or the gradients are not finite."""
        config = self.recipe.optimizer
        begin, batch = self._next_batch()
        self.steps += 1
        rate = learning_rate(config, self.recipe.train.steps, self.steps)
        factor = self._scale.value
        try:
            with for_kernels(self.ops):
                loss, grads = self._gradients(batch, factor)
                norm = self._norm(grads) / factor
            finite = math.isfinite(norm)
            if finite:
                scale = config.grad_clip / norm if config.grad_clip and norm > config.grad_clip else 1.0
                self._optimizer.step(grads, rate, scale / factor)
                self.sharded.weights.publish()
                self._scale.good()
            else:
                self._scale.overflow()
        except ConfigError as error:
            raise ConfigError(
                f"{error} at step {self.steps}, whose batch begins at {json.dumps(begin)}: training "
                f"diverged; lower optimizer.learning_rate ({rate:.3g} at this step) or lengthen "
                "optimizer.warmup_steps"
            ) from None
        return StepRecord(
            self.steps,
            loss,
            norm if finite else None,
            rate,
            batch.num_tokens,
            model_flops(self.model, batch),
            factor if self._scale.active else None,
            not finite,
        )

    def validation_loss(self, sequences: int | None = None) -> float | None:
        """Mean loss in nats of the first `sequences` held-out sequences (0: all; None: the recipe's number).

        None where the data holds nothing out.
        """
        train = self.recipe.train
        limit = train.validation_sequences if sequences is None else sequences
        if limit not in self._held_out:
            self._held_out[limit] = self.source.validation(train.seq_length, train.batch_size, limit)
        values: list[float] = []
        with torch.no_grad():
            for batch in self._held_out[limit]:
                values += self._loss(batch, 1.0)[1].tolist()
        return -math.fsum(values) / len(values) if values else None

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder: weights, configuration, tokenizer and chat template. Every rank calls it."""
        save_model(self.model, folder, writes=self.mesh.data.rank == 0)
        if self.mesh.rank == 0:
            self.tokenizer.save(folder)
        self.mesh.barrier()

    def tensors(self) -> Iterator[tuple[str, Region]]:
        """(name, region) of weights and optimizer state, which a snapshot reads and fills.

        Names are a kind (model, master, first or second) and the checkpoint's: `first/model.norm.weight`.
        """
        kinds: dict[str, list[Tensor | None]] = {
            "model": [slot.weights for slot in self.sharded.slots],
            **self._optimizer.tensors(),
        }
        for kind, tensors in kinds.items():
            yield from self.sharded.regions(kind, tensors)

    def state(self) -> dict[str, Any]:
        """Everything else that the next step depends on, in JSON values."""
        return {
            "step": self.steps,
            "updates": self._optimizer.steps,
            "data": self._stream.state(),
            "loss_scale": self._scale.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; the caller has filled `tensors`."""
        train = self.recipe.train
        self.steps, self._optimizer.steps = int(state["step"]), int(state["updates"])
        self._scale.restore(state["loss_scale"])
        self.sharded.weights.publish()
        self._stream = self.source.stream(train.batch_size, train.seq_length, state["data"])

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds from step to step, by purpose."""
        return (
            self.sharded.memory()
            | self._optimizer.memory()
            | {"checkpoints": 0 if self._checkpoints is None else self._checkpoints.nbytes}
        )

    def _recompute(self, host: Host) -> None:
        """Set up the recipe's recomputation."""
        parallel, device = self.recipe.parallel, self.ops.device
        self._checkpoints = None
        if not (parallel.partition_activations or parallel.offload_activations):
            recompute_(self.model, self.recipe.train.recompute)
            return
        shared_by = self.mesh.tensor if parallel.partition_activations else RankGroup()
        zeros = host.zeros if parallel.offload_activations else partial(torch.zeros, device=device)
        self._checkpoints = Checkpoints(self.config.num_layers, shared_by, zeros, device)
        keep_checkpoints(self.model, self._checkpoints)

    def _next_batch(self) -> tuple[dict[str, Any], TrainingBatch]:
        """(where it begins, batch) of the next batch with a token that counts."""
        for _ in range(EMPTY_BATCHES):
            begin = self._stream.state()
            batch = self._stream.next()
            if len(batch.rows_R):
                return begin, batch
        raise ConfigError(
            f"data.source={self.recipe.data.source!r} has nothing to learn in {EMPTY_BATCHES} batches in "
            "a row: no token counts in the loss"
        )

    def _loss(self, batch: TrainingBatch, weight: float) -> tuple[Tensor, Tensor]:
        """(the sum over targets of −weight · log p, log p [R] without gradients)."""
        weight_R = torch.full((len(batch.rows_R),), weight, device=self.ops.device)
        return self.model.lm_head.loss(self._predicting(batch), batch.targets_R, weight_R)

    def _gradients(self, batch: TrainingBatch, factor: float) -> tuple[float, list[Tensor]]:
        """(mean loss over the batch, its gradients times `factor`).

        Copy i mod n computes part i of the batch; gradients of neighbouring parts are added first, so the sum is one
        tree over the parts at every number n of copies.
        """
        copies, count = self.mesh.data, len(batch.rows_R)
        total, own, rounds = PairwiseSum(), [torch.zeros(0)], self._parts // copies.size
        for i in range(rounds):
            part = batch.share(i * copies.size + copies.rank, self._parts) if self._parts > 1 else batch
            with self._dropout.during(self.steps, self._padded(part).tokens_T):
                loss, logprob_R = self._loss(part, factor / count)
                self.sharded.gradients.backward(loss, i == 0, i == rounds - 1)
            own.append(logprob_R)
            if self.recipe.parallel.reduce_every == "micro_step" or i == rounds - 1:
                total.add([slot.gradients.clone() if i < rounds - 1 else slot.gradients for slot in self.sharded.slots])
        logprob_R = copies.all_gather_uneven(torch.cat(own), "loss")
        if not torch.isfinite(logprob_R).all():
            raise ConfigError("the loss is not finite")
        return -math.fsum(logprob_R.tolist()) / count, total.total()

    def _norm(self, grads: list[Tensor]) -> float:
        groups = (self.mesh.tensor, self.mesh.data) if self.sharded.stage else (self.mesh.tensor,)
        return global_norm(self.sharded.chunks(grads), self.ops, groups)


def _parts(recipe: Recipe, mesh: Mesh) -> int:
    """The number of parts of a batch, for micro-batches and copies of the model together."""
    asked, copies = recipe.train.micro_batches, mesh.data.size
    parts = max(asked, copies)
    if parts % copies:
        raise ConfigError(
            f"train.micro_batches={asked} is no multiple of the {copies} copies of the model that "
            f"{mesh.size} processes are with parallel.tensor={mesh.tensor.size}"
        )
    if parts > recipe.train.batch_size:
        raise ConfigError(
            f"train.batch_size={recipe.train.batch_size} rows are too few for {parts} parts: "
            f"{mesh.size} processes are {copies} copies of the model"
        )
    return parts
