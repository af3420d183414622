"""The trainer: one model, one recipe, one step at a time. Forward runs through the server's own ops.

A step's life: a batch comes from the stream · forward by the kernels, micro-batch by micro-batch · log-probabilities of
the targets · backward · the gradients' tree, norm and clip · AdamW. Nothing here reads a clock or writes a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.attention.dense import DenseContext
from headrace.errors import ConfigError
from headrace.kernels.autograd import AutogradOps, head_loss
from headrace.kernels.ops import Ops, load_ops
from headrace.model.huggingface import save_model
from headrace.train.config import Recipe
from headrace.train.data import Batch, open_source
from headrace.train.flops import model_flops
from headrace.train.optimizer import AdamW, PairwiseSum, global_norm
from headrace.train.recompute import recompute_
from headrace.train.scaler import LossScale
from headrace.train.schedule import learning_rate
from headrace.train.start import initial_model

__all__ = ["StepRecord", "Trainer"]

EMPTY_BATCHES = 1000
"""Batches in a row without anything to learn, after which the data is at fault."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did. Nothing in it depends on the machine's speed."""

    step: int
    loss: float
    """The mean over the step's targets, in nats, unrounded."""
    grad_norm: float | None
    """Before clipping; None where gradients overflowed."""
    lr: float
    tokens: int
    """Tokens that the step computed."""
    flops: float
    """Operations of forward and backward, see `model_flops`."""
    loss_scale: float | None = None
    """What the loss was multiplied with; None where it is not scaled."""
    skipped: bool = False
    """Whether the gradients overflowed float16, so that nothing was updated."""


class Trainer:
    """Model, data and optimizer of one run. `step()` does one step; `log_probabilities(batch)` is its forward."""

    def __init__(self, recipe: Recipe, ops: Ops | None = None) -> None:
        if recipe.parallel.tensor > 1:
            raise ConfigError(f"parallel.tensor={recipe.parallel.tensor} needs as many processes: start them with "
                              f"torchrun --nproc-per-node {recipe.parallel.tensor} -m headrace train …")
        self.recipe = recipe
        self.source = open_source(recipe.data)
        self.tokenizer = self.source.tokenizer
        self.ops = AutogradOps(ops or load_ops(recipe.train.kernels), recipe.model.shards, recipe.model.shards)
        self.model = initial_model(recipe, self.tokenizer, self.ops)
        self.config = self.model.config
        recompute_(self.model, recipe.train.recompute)
        named = dict(self.model.named_parameters())
        self.parameters = list(named.values())
        self.steps = 0
        """Steps done."""
        self._names = list(named)
        self._optimizer = AdamW(named, recipe.optimizer, self.ops)
        self._scale = LossScale(recipe.train, active=self.config.dtype == "float16")
        self._stream = self.source.stream(recipe.train.batch_size, recipe.train.seq_length)
        self._held_out: dict[int, list[Batch]] = {}

    def log_probabilities(self, batch: Batch) -> Tensor:
        """log p [R] of the batch's targets: the bits that the server computes for them."""
        return self.model.lm_head.log_probabilities(self._hidden(batch), batch.targets_R.to(self.ops.device))

    def step(self) -> StepRecord:
        """One step of the recipe. Raises `ConfigError` when the loss or the gradients are not finite."""
        config = self.recipe.optimizer
        begin, batch = self._next_batch()
        self.steps += 1
        rate = learning_rate(config, self.recipe.train.steps, self.steps)
        factor = self._scale.value
        try:
            loss, grads = self._gradients(batch, factor)
            norm = global_norm(grads, self.ops) / factor
            finite = math.isfinite(norm)
            if finite:
                scale = config.grad_clip / norm if config.grad_clip and norm > config.grad_clip else 1.0
                self._optimizer.step(grads, rate, scale / factor)
                self._scale.good()
            else:
                self._scale.overflow()
        except ConfigError as error:
            raise ConfigError(f"{error} at step {self.steps}, whose batch begins at {json.dumps(begin)}: training "
                              f"diverged; lower optimizer.learning_rate ({rate:.3g} at this step) or lengthen "
                              "optimizer.warmup_steps") from None
        return StepRecord(self.steps, loss, norm if finite else None, rate, batch.num_tokens,
                          model_flops(self.model, batch), factor if self._scale.active else None, not finite)

    def validation_loss(self, sequences: int | None = None) -> float | None:
        """Mean loss in nats of the first `sequences` held-out ones (0: of all; None: as the recipe says).

        None where the data holds nothing out.
        """
        train = self.recipe.train
        limit = train.validation_sequences if sequences is None else sequences
        if limit not in self._held_out:
            self._held_out[limit] = self.source.validation(train.seq_length, train.batch_size, limit)
        with torch.no_grad():
            values = [x for batch in self._held_out[limit] for x in self.log_probabilities(batch).tolist()]
        return -math.fsum(values) / len(values) if values else None

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder: weights, configuration, tokenizer with its chat template."""
        save_model(self.model, folder)
        self.tokenizer.save(folder)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of weights and optimizer state: what a snapshot reads, and fills."""
        for name, parameter in zip(self._names, self.parameters):
            yield f"model/{name}", parameter.detach()
        yield from self._optimizer.tensors()

    def state(self) -> dict[str, Any]:
        """All else that the next step depends on, in plain JSON values."""
        return {"step": self.steps, "updates": self._optimizer.steps, "data": self._stream.state(),
                "loss_scale": self._scale.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the caller has filled `tensors`."""
        train = self.recipe.train
        self.steps, self._optimizer.steps = int(state["step"]), int(state["updates"])
        self._scale.restore(state["loss_scale"])
        self._stream = self.source.stream(train.batch_size, train.seq_length, state["data"])

    def _next_batch(self) -> tuple[dict[str, Any], Batch]:
        """The next batch in which something counts, and where it begins."""
        for _ in range(EMPTY_BATCHES):
            begin = self._stream.state()
            batch = self._stream.next()
            if len(batch.rows_R):
                return begin, batch
        raise ConfigError(f"data.source={self.recipe.data.source!r} has nothing to learn in {EMPTY_BATCHES} batches in "
                          "a row: no token counts in the loss")

    def _gradients(self, batch: Batch, factor: float) -> tuple[float, list[Tensor]]:
        """(mean loss over the batch, its gradients times `factor`), micro-batch by micro-batch."""
        parts, head = self.recipe.train.micro_batches, self.model.lm_head
        total, values = PairwiseSum(), []
        for part in batch.split(parts) if parts > 1 else [batch]:
            if not len(part.rows_R):
                continue
            weight_R = torch.full(part.rows_R.shape, -factor / len(batch.rows_R), device=self.ops.device)
            loss, logprob_R = head_loss(self.ops, self._hidden(part), head.weight, part.targets_R.to(self.ops.device),
                                        weight_R, head.part)
            values += logprob_R.tolist()
            if not torch.isfinite(logprob_R).all():
                raise ConfigError("the loss is not finite")
            total.add(torch.autograd.grad(loss, self.parameters))
        return -math.fsum(values) / len(values), total.total()

    def _hidden(self, batch: Batch) -> Tensor:
        """What the head multiplies [R, D], of the tokens whose prediction counts."""
        ctx = DenseContext(self.ops, self.config, batch.lengths,
                           getattr(torch, self.recipe.train.kv_cache_dtype))
        ids_T, positions_T, rows_R = (x.to(self.ops.device) for x in (batch.ids_T, batch.positions_T, batch.rows_R))
        return self.ops.embedding(rows_R, self.model.hidden(ids_T, positions_T, ctx))
