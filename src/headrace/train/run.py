"""A run: the trainer's steps, and all that they leave on the disk.

    OUT/metrics.jsonl   an object a step     OUT/tensorboard/   the same for TensorBoard     OUT/loss.png
    OUT/snapshots/      to go on from        OUT/hf/            the model, when it is done
    OUT/run.json        who began the run

A run that was cut off and resumed leaves the files of one that was not, but for the times in them.
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
from headrace.parallel.agreement import of_first
from headrace.parallel.links import LinkError
from headrace.parallel.mesh import Mesh, launched
from headrace.train.config import Recipe
from headrace.train.flops import matrix_rate
from headrace.train.metrics import Events, Metrics, draw, memory_bytes, read_metrics
from headrace.train.plan import Part
from headrace.train.snapshots.disk import clear_after, snapshots
from headrace.train.snapshots.reader import Snapshot, newest_whole
from headrace.train.snapshots.writer import SnapshotWriter
from headrace.train.trainer import StepRecord, Trainer

__all__ = ["Sampler", "TrainResult", "own_device", "train"]

METRICS, SNAPSHOTS, RUN = "metrics.jsonl", "snapshots", "run.json"

Sampler = Callable[[Trainer], None]
"""May generate from the trainer's model as it is; `Transformer.with_ops` shares its weights."""
OnStep = Callable[[Mapping[str, Any]], None]
"""Sees each line of metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves behind. `checkpoint` is the Hugging Face folder."""

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

    `on_step` sees every step's line of metrics.jsonl, on rank 0. `sampler` is called every `train.sample_every` steps,
    on every rank. `ops` overrides the recipe's kernels, `mesh` the ranks that torchrun started. With `resume`, or
    started again by torchrun, the run goes on from its newest whole snapshot, or from the beginning if there is none.
    Raises `ConfigError` where `out` holds a run otherwise, where training diverges, where a rank is lost, and where the
    disk does not take a file: what was there stays, and can be resumed.
    """
    out = Path(out)
    if mesh is None:
        parallel = recipe.parallel
        mesh = launched(
            parallel.tensor, own_device(recipe), parallel.sequence, parallel.timeout, parallel.reduction == "library"
        )
    with _disk(out), _memory(recipe, mesh):
        _require_one_recipe(recipe, mesh)
        resume = of_first(mesh, lambda: _begin(out, resume))
        run = _Run(recipe, out, ops, mesh, clock, warn)
        if resume:
            run.restore()
        run.go(on_step, sampler)
        run.trainer.save(out / "hf")
        return run.result()


def own_device(recipe: Recipe) -> torch.device:
    """Where this process computes: its own GPU of the machine's, or the CPU."""
    if recipe.train.kernels != "cuda":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class _Run:
    """Every rank has one; rank 0 alone writes what is not a snapshot, and speaks."""

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
        self._mesh, self._speaks = mesh, mesh.rank == 0
        self._clock = clock
        self._warn = warn if self._speaks else _say_nothing
        self._snapshots = SnapshotWriter(
            out / SNAPSHOTS, mesh, keep=recipe.train.keep_snapshots, tokenizer=self.trainer.tokenizer.save
        )
        self._peak = mesh.size * (recipe.train.peak_flops or matrix_rate(self.trainer.ops.device, clock))

    def restore(self) -> None:
        """Go on from the newest whole snapshot; without one, begin."""
        folder = self.out / SNAPSHOTS
        snapshot = newest_whole(folder, self._warn, self._mesh)
        of_first(self._mesh, lambda: clear_after(folder, snapshot.step if snapshot else -1))
        if snapshot is None:
            return
        snapshot.require_same(self._record(), "model", "of another model")
        self._warn_of_changes(snapshot)
        snapshot.read(self.trainer.tensors(), self._mesh)
        self.trainer.restore(dict(snapshot.record["state"]))

    def go(self, on_step: OnStep | None, sampler: Sampler | None) -> None:
        """All steps that are left."""
        train, trainer = self.recipe.train, self.trainer
        with contextlib.ExitStack() as files:
            record = _Record(self.out, trainer.steps, files) if self._speaks else None
            files.enter_context(self._snapshots)
            while trainer.steps < train.steps:
                line = self._step()
                if record is not None:
                    record.write(line)
                    if on_step is not None:
                        on_step(line)
                self._snapshots.poll()
                if self._due(train.snapshot_every) or trainer.steps == train.steps:
                    if record is not None:  # before the snapshot has a name, so that there are no lines amiss
                        record.sync()
                        draw(read_metrics(self.out / METRICS), self.out / "loss.png")
                    self._snapshots.begin(self._record(), trainer.tensors())
                if sampler is not None and self._due(train.sample_every):
                    with trainer.sharded.whole():
                        sampler(trainer)

    def result(self) -> TrainResult:
        """What metrics.jsonl says of the whole run."""
        lines = read_metrics(self.out / METRICS)
        return TrainResult(
            self.out / "hf",
            lines[0]["loss"],
            lines[-1]["loss"],
            lines[-1].get("val_loss"),
            sum(line["tokens"] for line in lines),
        )

    def _step(self) -> dict[str, Any]:
        """Do one step, and say how it was."""
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
        """What a snapshot says of its run."""
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
                "the run goes on, but not with the bits that it would have had there"
            )
        if theirs["layout"] != ours["layout"]:
            self._warn(
                f"{snapshot.folder} was written by {_told(theirs['layout'])}; this is {_told(ours['layout'])}: "
                "the state is the same to the bit, what follows has this layout's bits where they differ"
            )
        for section in ("optimizer", "train"):
            for key, value in ours["recipe"][section].items():
                was = theirs["recipe"][section].get(key)
                if was != value:
                    self._warn(f"{section}.{key} was {was!r} until step {snapshot.step} and is {value!r} from here on")


class _Record:
    """The two accounts of a run's steps, a line each."""

    def __init__(self, out: Path, steps: int, files: contextlib.ExitStack) -> None:
        self._accounts = (Metrics(out / METRICS, steps), Events(out / "tensorboard", steps))
        for account in self._accounts:
            files.callback(account.close)

    def write(self, line: dict[str, Any]) -> None:
        for account in self._accounts:
            account.write(line)

    def sync(self) -> None:
        for account in self._accounts:
            account.sync()


def _say_nothing(_: str) -> None:
    pass


def _told(layout: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in layout.items())


def _require_one_recipe(recipe: Recipe, mesh: Mesh) -> None:
    """Raise `ConfigError`, on every rank, that names the first key in which ranks differ."""
    told = mesh.tell(dataclasses.asdict(recipe))
    for rank, theirs in enumerate(told):
        for section, ours in told[0].items():
            keys = ours if isinstance(ours, dict) else {"": ours}
            there = theirs[section] if isinstance(ours, dict) else {"": theirs[section]}
            for key, value in keys.items():
                require(
                    there[key] == value,
                    f"rank {rank} was started with {section}{'.' * bool(key)}{key}="
                    f"{there[key]!r}, rank 0 with {value!r}: give all of them one recipe and the same --set",
                )


def _begin(out: Path, resume: bool) -> bool:
    """Whether to resume what `out` holds; who begins the run is written down there."""
    resume = _goes_on(out, resume)
    out.mkdir(parents=True, exist_ok=True)
    (out / RUN).write_text(json.dumps({"launcher": _launcher()}) + "\n", encoding="utf-8")
    return resume


@contextlib.contextmanager
def _disk(out: Path) -> Iterator[None]:
    """What the disk refuses, and a rank that is lost, become one clear line."""
    try:
        yield
    except LinkError as error:
        raise ConfigError(f"{error}: see what it said; {_last(out)}. Go on with --resume") from None
    except (ConnectionError, TimeoutError):  # of a pipe or another process
        raise
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out} cannot be written: {error.strerror or error}; {_last(out)}. "
            "Make room, then go on with --resume"
        ) from None


@contextlib.contextmanager
def _memory(recipe: Recipe, mesh: Mesh) -> Iterator[None]:
    """Memory that is not there becomes one line, which says what the states take and what less would."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in told:
            raise
        part = Part(recipe, mesh.tensor.size, mesh.tensor.rank)
        take = {stage: sum(part.state(mesh.data.size, stage).values()) / 2**20 for stage in (recipe.parallel.zero, 3)}
        less = (
            f"; parallel.zero=3 makes that {take[3]:,.0f} MiB"
            if recipe.parallel.zero < 3 and mesh.data.size > 1
            else "; more processes with parallel.zero=3, or a higher parallel.tensor, divide them"
        )
        raise ConfigError(
            f"there is no memory for this: the model's states alone take "
            f"{take[recipe.parallel.zero]:,.0f} MiB of every process at parallel.zero="
            f"{recipe.parallel.zero} with {mesh.data.size} copies{less}. `headrace plan` accounts for "
            "it all"
        ) from None


def _last(out: Path) -> str:
    """The snapshot that is left."""
    found = snapshots(out / SNAPSHOTS)
    return f"the last good snapshot is {found[-1]}" if found else "there is no snapshot yet"


def _goes_on(out: Path, resume: bool) -> bool:
    """Whether to resume what `out` holds. Raises `ConfigError` where nobody said so."""
    require(not out.exists() or out.is_dir(), f"--out {out} is a file: name a folder")
    metrics = out / METRICS
    measured = metrics.exists() and metrics.stat().st_size > 0
    if not measured and not any((out / name).exists() for name in (SNAPSHOTS, "hf")):
        return False  # a run that did not come to its first step leaves nothing to go on with
    require(resume or _restarted(out), f"{out} holds a run: go on with it by --resume, or give another --out")
    return True


def _restarted(out: Path) -> bool:
    """Whether torchrun starts this process again, after it began this very run."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    try:
        return bool(json.loads((out / RUN).read_text(encoding="utf-8"))["launcher"] == _launcher())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _launcher() -> str:
    """Who started this process: the same for all that one torchrun starts, one after another."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}:{os.getppid()}"
