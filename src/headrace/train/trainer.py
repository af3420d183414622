"""The trainer: one process, one model, one recipe. Forward runs through the server's own ops.

A step's life: texts are packed into a batch · forward by the kernels · log-probabilities of the targets ·
backward in torch · the gradients' norm and clip · AdamW. Nothing here reads a clock: a recipe is its steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.attention.dense import DenseContext
from headrace.errors import ConfigError
from headrace.kernels.autograd import AutogradOps, log_probability
from headrace.kernels.ops import Ops, load_ops
from headrace.model.huggingface import save_model
from headrace.model.transformer import Transformer
from headrace.text.tokenizer import Tokenizer
from headrace.train.config import Recipe
from headrace.train.data import Batch, Source, batches, collate
from headrace.train.optimizer import AdamW, global_norm, learning_rate

__all__ = ["Sampler", "StepRecord", "TrainResult", "Trainer", "train"]

VALIDATION_TEXTS = 256


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of metrics.jsonl. `loss` is the mean over the targets of the step, in nats, unrounded."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    """Tokens that the step computed."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves behind. `checkpoint` is the Hugging Face folder."""

    checkpoint: Path
    first_loss: float
    final_loss: float
    validation_loss: float
    """Mean loss of held-out texts, after the last step."""
    tokens: int


Sampler = Callable[[Transformer, Tokenizer, int], None]
"""(model, tokenizer, step): may generate from the model; `Transformer.with_ops` shares its weights."""


class Trainer:
    """Model, data and optimizer of one run. `step()` does one step; `loss(batch)` is its forward."""

    def __init__(self, recipe: Recipe, ops: Ops | None = None) -> None:
        self.recipe = recipe
        self.source = Source(recipe.data)
        self.tokenizer = self.source.tokenizer
        eos = self.tokenizer.eos_token_id
        self.config = dataclasses.replace(recipe.model, eos_token_ids=() if eos is None else (eos,))
        self.tokenizer.check_vocabulary(self.config.vocab_size)
        self.ops = AutogradOps(ops or load_ops(recipe.train.kernels))
        self.model = Transformer(self.config, self.ops)
        self.model.init_weights(recipe.train.seed, recipe.train.init_std)
        self.parameters = list(self.model.parameters())
        self._optimizer = AdamW(self.parameters, recipe.train)
        self._batches = batches(self.source.training(), self.tokenizer, recipe.train.batch_size,
                                recipe.train.seq_length)
        self._steps = 0

    def log_probabilities(self, batch: Batch) -> torch.Tensor:
        """log p [R] of the batch's targets: the bits that the server computes for them."""
        ctx = DenseContext(self.ops, self.config, batch.lengths,
                           getattr(torch, self.recipe.train.kv_cache_dtype))
        logits_RV = self.model(batch.ids_T, batch.positions_T, ctx, batch.rows_R)
        return log_probability(self.ops, logits_RV, batch.targets_R, self.model.vocab_bounds)

    def step(self) -> StepRecord:
        """One step of the recipe. Raises `ConfigError` when the loss or the gradients are not finite."""
        config = self.recipe.train
        self._steps += 1
        batch = next(self._batches)
        logprob_R = self.log_probabilities(batch)
        loss = -logprob_R.double().mean()
        rate = learning_rate(config, self._steps)
        self._check(loss.item(), "loss", rate)
        grads = torch.autograd.grad(loss, self.parameters)
        norm = global_norm(grads)
        self._check(norm, "gradient's norm", rate)
        scale = config.grad_clip / norm if config.grad_clip and norm > config.grad_clip else 1.0
        self._optimizer.step(grads, rate, scale)
        return StepRecord(self._steps, loss.item(), rate, norm, batch.num_tokens)

    def validation_loss(self, texts: int = VALIDATION_TEXTS) -> float:
        """Mean loss of held-out texts, in nats."""
        batch = collate(self.source.validation(texts), self.tokenizer, self.recipe.train.seq_length)
        with torch.no_grad():
            return -float(self.log_probabilities(batch).double().mean())

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder: weights, configuration, tokenizer with its chat template."""
        save_model(self.model, folder)
        self.tokenizer.save(folder)

    def _check(self, value: float, what: str, rate: float) -> None:
        if not math.isfinite(value):
            raise ConfigError(f"the {what} is {value} at step {self._steps}: training diverged; lower "
                              f"train.learning_rate ({rate:.3g} at this step) or lengthen train.warmup_steps")


def train(recipe: Recipe, out: str | Path, on_step: Callable[[StepRecord], None] | None = None,
          sampler: Sampler | None = None, ops: Ops | None = None) -> TrainResult:
    """Train by `recipe` into folder `out`: metrics.jsonl, a line a step, and the model in hf/.

    `on_step` sees every step's record. `sampler` is called every `train.sample_every` steps. `ops` overrides
    the recipe's kernels. Files of an earlier run in `out` are replaced.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, ops)
    every = recipe.train.sample_every
    records: list[StepRecord] = []
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        for _ in range(recipe.train.steps):
            record = trainer.step()
            records.append(record)
            metrics.write(json.dumps(dataclasses.asdict(record)) + "\n")
            metrics.flush()
            if on_step is not None:
                on_step(record)
            if sampler is not None and every and record.step % every == 0:
                sampler(trainer.model, trainer.tokenizer, record.step)
    validation_loss = trainer.validation_loss()
    trainer.save(out / "hf")
    return TrainResult(out / "hf", records[0].loss, records[-1].loss, validation_loss,
                       sum(record.tokens for record in records))
