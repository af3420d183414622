"""A training run: the trainer's steps and the files that they write.

    OUT/metrics.jsonl   an object a step      OUT/tensorboard/   the same for TensorBoard     OUT/loss.png
    OUT/snapshots/      to resume from        OUT/hf/            the trained model
    OUT/run.json        the launcher that began the run

An interrupted and resumed run writes the same files as an uninterrupted one, except for the times in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.config import require
from headrace.errors import ConfigError
from headrace.kernels.training import TrainingOps
from headrace.model.families import require_writable
from headrace.parallel.agreement import on_first_rank
from headrace.parallel.links import LinkError
from headrace.parallel.mesh import Mesh, launched
from headrace.train.config import Recipe
from headrace.train.flops import matrix_rate
from headrace.train.metrics import Events, MetricsFile, memory_bytes, read_metrics
from headrace.train.paths import METRICS, SNAPSHOTS, begin
from headrace.train.plan import RankModel
from headrace.train.plot import draw
from headrace.train.snapshots.disk import clear_after, snapshots
from headrace.train.snapshots.reader import Snapshot, newest_whole
from headrace.train.snapshots.writer import SnapshotWriter
from headrace.train.trainer import StepRecord, Trainer
from headrace.typed import expanded

__all__ = ["Sampler", "TrainResult", "own_device", "train"]

Sampler = Callable[[Trainer], None]
"""Called with the trainer, to generate from its current weights; see `Transformer.with_ops`."""
OnStep = Callable[[Mapping[str, Any]], None]
"""Called with each line of metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a run. `checkpoint` is the Hugging Face folder."""

    checkpoint: Path
    first_loss: float
    final_loss: float
    validation_loss: float | None
    """Mean loss of held-out texts, after the last step; None where the data holds nothing out."""
    tokens: int


def train(
    recipe: Recipe,
    out: str | Path,
    on_step: OnStep | None = None,
    sampler: Sampler | None = None,
    ops: TrainingOps | None = None,
    *,
    mesh: Mesh | None = None,
    resume: bool = False,
    warn: Callable[[str], None] = print,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainResult:
    """Train by `recipe` into folder `out`.

    `on_step` is called on rank 0 with every step's line of metrics.jsonl; `sampler` on every rank, every
    `train.sample_every` steps. `ops` overrides the recipe's kernels, `mesh` the processes of the run. With
    `resume`, or restarted by torchrun, the run continues from its newest readable snapshot, or from the beginning.
    Raises `ConfigError` where no config.json describes the model, where `out` holds a run that is not to be resumed,
    where training diverges, a rank is lost or a file cannot be written; earlier snapshots stay and can be resumed.
    """
    out = expanded(out)
    require_writable(recipe.model)
    if mesh is None:
        parallel = recipe.parallel
        mesh = launched(
            parallel.tensor, own_device(recipe), parallel.sequence, parallel.timeout, parallel.reduction == "library"
        )
    with _disk(out), _memory(recipe, mesh):
        _require_one_recipe(recipe, mesh)
        resume = on_first_rank(mesh, lambda: begin(out, resume))
        run = _TrainingRun(recipe, out, ops, mesh, clock, warn)
        run.warn_of_notes()
        if resume:
            run.restore()
        run.go(on_step, sampler)
        run.trainer.save(out / "hf")
        return run.result()


def own_device(recipe: Recipe) -> torch.device:
    """The device of this process: the GPU of its local rank, or the CPU."""
    if recipe.train.kernels != "cuda":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class _TrainingRun:
    """One rank's part of a run. Rank 0 alone writes the files outside of snapshots, and warns."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        ops: TrainingOps | None,
        mesh: Mesh,
        clock: Callable[[], float],
        warn: Callable[[str], None],
    ) -> None:
        self.recipe, self.out = recipe, out
        self.trainer = Trainer(recipe, ops, mesh)
        self._mesh, self._is_first = mesh, mesh.rank == 0
        self._clock = clock
        self._warn = warn if self._is_first else _ignore
        self._snapshots = SnapshotWriter(
            out / SNAPSHOTS, mesh, keep=recipe.train.keep_snapshots, tokenizer=self.trainer.tokenizer.save
        )
        self._peak = mesh.size * (recipe.train.peak_flops or matrix_rate(self.trainer.ops.device, clock))

    def warn_of_notes(self) -> None:
        """Say what differs from the recipe."""
        for note in self.recipe.notes:
            self._warn(note)

    def restore(self) -> None:
        """Load the newest readable snapshot, if there is one."""
        folder = self.out / SNAPSHOTS
        snapshot = newest_whole(folder, self._warn, self._mesh)
        on_first_rank(self._mesh, lambda: clear_after(folder, snapshot.step if snapshot else -1))
        if snapshot is None:
            return
        snapshot.require_same(self._record(), "model", "of another model")
        self._warn_of_changes(snapshot)
        snapshot.read(self.trainer.tensors(), self._mesh)
        self.trainer.restore(dict(snapshot.record["state"]))

    def go(self, on_step: OnStep | None, sampler: Sampler | None) -> None:
        """Do all remaining steps."""
        train, trainer = self.recipe.train, self.trainer
        with contextlib.ExitStack() as files:
            record = _StepRecords(self.out, trainer.steps, files) if self._is_first else None
            files.enter_context(self._snapshots)
            while trainer.steps < train.steps:
                line = self._step()
                if record is not None:
                    record.write(line)
                    if on_step is not None:
                        on_step(line)
                self._snapshots.poll()
                if self._due(train.snapshot_every) or trainer.steps == train.steps:
                    if record is not None:  # before the snapshot, so that no line of its steps can be missing
                        record.sync()
                        self._plot()
                    self._snapshots.begin(self._record(), trainer.tensors())
                if sampler is not None and self._due(train.sample_every):
                    with trainer.sharded.whole():
                        sampler(trainer)

    def result(self) -> TrainResult:
        """The result, from the lines of metrics.jsonl."""
        lines = read_metrics(self.out / METRICS)
        return TrainResult(
            self.out / "hf",
            lines[0]["loss"],
            lines[-1]["loss"],
            lines[-1].get("val_loss"),
            sum(line["tokens"] for line in lines),
        )

    def _plot(self) -> None:
        failed = draw(read_metrics(self.out / METRICS), self.out / "loss.png")
        if failed:
            self._warn(failed)

    def _step(self) -> dict[str, Any]:
        """Do one step; returns its line of metrics.jsonl."""
        train = self.recipe.train
        began = self._clock()
        try:
            record = self.trainer.step()
        except ConfigError as error:  # the same on all ranks
            with contextlib.suppress(OSError):
                self._snapshots.finish()
            raise ConfigError(f"{error}; {_last(self.out)}") from None
        line = self._line(record, max(self._clock() - began, 1e-9))
        if self._due(train.validate_every) or record.step == train.steps:
            held_out = self.trainer.validation_loss()
            line |= {} if held_out is None else {"val_loss": held_out}
        return line

    def _line(self, record: StepRecord, seconds: float) -> dict[str, Any]:
        line = {
            "step": record.step,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "lr": record.lr,
            "tokens": record.tokens,
            "tokens_per_second": record.tokens / seconds,
            "mfu": record.flops / seconds / self._peak,
            "memory_bytes": memory_bytes(self.trainer.ops.device),
        }
        if record.loss_scale is not None:
            line |= {"loss_scale": record.loss_scale, "skipped": record.skipped}
        return line

    def _due(self, every: int) -> bool:
        return bool(every) and self.trainer.steps % every == 0

    def _record(self) -> dict[str, Any]:
        """The record of a snapshot: layout, model, recipe, fingerprint, state, memory."""
        recipe = dataclasses.asdict(self.recipe)
        layout = {**recipe.pop("parallel"), "copies": self._mesh.data.size}
        del layout["timeout"]
        return {
            "layout": layout,
            "model": dataclasses.asdict(self.trainer.config),
            "recipe": recipe,
            "fingerprint": self.trainer.ops.fingerprint(),
            "state": self.trainer.state(),
            "memory": {**self.trainer.memory(), "process": memory_bytes(self.trainer.ops.device)},
        }

    def _warn_of_changes(self, snapshot: Snapshot) -> None:
        ours, theirs = json.loads(json.dumps(self._record())), snapshot.record
        if theirs["fingerprint"] != ours["fingerprint"]:
            self._warn(
                f"{snapshot.folder} was written under {theirs['fingerprint']}, this is {ours['fingerprint']}: "
                "the run continues, but its bits will differ from a run there"
            )
        if theirs["layout"] != ours["layout"]:
            self._warn(
                f"{snapshot.folder} was written by {_listed(theirs['layout'])}; this is {_listed(ours['layout'])}: "
                "the state is the same to the bit; later steps have this layout's bits where layouts differ"
            )
        for section in ("optimizer", "train"):
            for key, value in ours["recipe"][section].items():
                was = theirs["recipe"][section].get(key)
                if was != value:
                    self._warn(f"{section}.{key} was {was!r} until step {snapshot.step} and is {value!r} from here on")


class _StepRecords:
    """metrics.jsonl and TensorBoard's events: a record of every step."""

    def __init__(self, out: Path, steps: int, files: contextlib.ExitStack) -> None:
        self._accounts = (MetricsFile(out / METRICS, steps), Events(out / "tensorboard", steps))
        for account in self._accounts:
            files.callback(account.close)

    def write(self, line: dict[str, Any]) -> None:
        for account in self._accounts:
            account.write(line)

    def sync(self) -> None:
        for account in self._accounts:
            account.sync()


def _ignore(_: str) -> None:
    pass


def _listed(layout: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in layout.items())


def _require_one_recipe(recipe: Recipe, mesh: Mesh) -> None:
    """Raise `ConfigError` on every rank that names the first key in which their recipes differ."""
    recipes = mesh.all_gather_object(dataclasses.asdict(recipe))
    for rank, theirs in enumerate(recipes):
        for section, ours in recipes[0].items():
            keys = ours if isinstance(ours, dict) else {"": ours}
            there = theirs[section] if isinstance(ours, dict) else {"": theirs[section]}
            for key, value in keys.items():
                require(
                    there[key] == value,
                    f"rank {rank} was started with {section}{'.' * bool(key)}{key}="
                    f"{there[key]!r}, rank 0 with {value!r}: give all of them one recipe and the same --set",
                )


@contextlib.contextmanager
def _disk(out: Path) -> Iterator[None]:
    """Turn a failed write or a lost rank into a `ConfigError` of one line."""
    try:
        yield
    except LinkError as error:
        raise ConfigError(f"{error}: read its output for the cause; {_last(out)}. Continue with --resume") from None
    except (ConnectionError, TimeoutError):  # of a pipe or another process
        raise
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out} cannot be written: {error.strerror or error}; {_last(out)}. "
            "Make room, then continue with --resume"
        ) from None


@contextlib.contextmanager
def _memory(recipe: Recipe, mesh: Mesh) -> Iterator[None]:
    """Turn a failed allocation into a `ConfigError` with the size of the model's states and how to reduce it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in message:
            raise
        part = RankModel(recipe, mesh.tensor.size, mesh.tensor.rank)
        take = {stage: sum(part.state(mesh.data.size, stage).values()) / 2**20 for stage in (recipe.parallel.zero, 3)}
        less = (
            f"; parallel.zero=3 makes that {take[3]:,.0f} MiB"
            if recipe.parallel.zero < 3 and mesh.data.size > 1
            else "; more processes with parallel.zero=3, or a higher parallel.tensor, divide them"
        )
        raise ConfigError(
            f"out of memory: the model's states alone take "
            f"{take[recipe.parallel.zero]:,.0f} MiB of every process at parallel.zero="
            f"{recipe.parallel.zero} with {mesh.data.size} copies{less}. `headrace plan` shows "
            "all of it"
        ) from None


def _last(out: Path) -> str:
    """The newest snapshot, for an error message."""
    found = snapshots(out / SNAPSHOTS)
    return f"the last good snapshot is {found[-1]}" if found else "there is no snapshot yet"
