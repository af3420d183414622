"""`headrace train`: train by a recipe."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from headrace.cli.extras import require_extra
from headrace.cli.launch import launch
from headrace.cli.parser import BAD_INPUT
from headrace.cli.progress import kernels
from headrace.config import require
from headrace.errors import HeadraceError
from headrace.typed import expanded

__all__ = ["TrainingView", "add", "add_overrides"]

RESTARTS = 3
"""Of a run with --processes, by default."""

LAUNCHER_SECONDS = 30.0
"""After which a rank prints a mistake that its machine's first rank should have printed."""

BAR = 10
"""Width of the bar, so that the line fits into 80 columns."""


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train",
        help="train a model by a recipe",
        description="Train by a TOML recipe. Writes DIR/metrics.jsonl, a line a step, DIR/snapshots/ and DIR/hf/.",
    )
    parser.add_argument(
        "recipe", type=expanded, help="a TOML file, or the name of a recipe that comes with headrace, such as demo"
    )
    parser.add_argument(
        "--out", type=expanded, required=True, metavar="DIR", help="the folder to write; it must not hold a run"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in DIR from its newest readable snapshot"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="ranks to start here, a multiple of parallel.tensor (default: 1; several machines need torchrun)",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help=f"with --processes, how often all ranks are started again after a crash (default: {RESTARTS})",
    )
    add_overrides(parser)
    parser.set_defaults(run=run)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add --set, which changes fields of the recipe."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a field of the recipe, as train.steps=100; may be given again",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train in this process, or in `--processes` of them; returns the exit code. The ranks of a run all call it."""
    from headrace.train.config import load_recipe
    from headrace.train.paths import goes_on

    rank = int(os.environ.get("RANK", "0"))
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        goes_on(arguments.out, arguments.resume)
        require_extra("train", "train")
    except HeadraceError:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            return BAD_INPUT  # printed by the first try
        if int(os.environ.get("LOCAL_RANK", "0")):
            # Local rank 0 prints the same mistake, unless another rank exits first: torchrun then ends it.
            time.sleep(LAUNCHER_SECONDS)
        raise
    try:
        if arguments.processes != 1:
            restarts = RESTARTS if arguments.max_restarts is None else arguments.max_restarts
            return launch(_rank_command(arguments), arguments.processes, restarts)
        require(
            arguments.max_restarts is None, "--max-restarts needs --processes 2 or more: one process is not restarted"
        )
        _train(recipe, arguments, rank)
    except HeadraceError as error:
        if rank == 0:
            raise
        raise type(error)(f"rank {rank}: {error}") from None
    return 0


def _rank_command(arguments: argparse.Namespace) -> list[str]:
    """The command of each rank. Raises `ConfigError` for numbers that cannot be."""
    require(arguments.processes >= 1, f"--processes {arguments.processes} must be at least 1")
    require((arguments.max_restarts or 0) >= 0, f"--max-restarts {arguments.max_restarts} must not be negative")
    require("WORLD_SIZE" not in os.environ, "torchrun has started the processes: leave --processes out")
    command = [sys.executable, "-m", "headrace", "train", str(arguments.recipe), "--out", str(arguments.out)]
    command += ["--resume"] if arguments.resume else []
    return command + [part for override in arguments.overrides for part in ("--set", override)]


def _train(recipe: Any, arguments: argparse.Namespace, rank: int) -> None:
    """Train with a progress bar and samples, which rank 0 alone shows."""
    from headrace.train.run import own_device, train  # imports torch, which takes seconds

    ops = kernels(recipe.train.kernels, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), own_device(recipe))
    with TrainingView(recipe, ops, shown=rank == 0) as view:
        result = train(recipe, arguments.out, view.step, view.sample, ops=ops, resume=arguments.resume, warn=view.warn)
    if rank == 0:
        held_out = "" if result.validation_loss is None else f", held out {result.validation_loss:.3f}"
        print(f"loss {result.first_loss:.3f} → {result.final_loss:.3f}{held_out}, {result.tokens} tokens")
        print(f"headrace generate {result.checkpoint} --prompt …")


class TrainingView:
    """A progress bar with the loss and the speed, and samples from the model in training."""

    def __init__(self, recipe: Any, ops: Any, every_seconds: float = 0.0, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._ops = ops
        self._every = every_seconds
        self._prompt: str | None = None
        self._last = time.monotonic()
        self._console = Console(highlight=False)
        self._progress = Progress(
            BarColumn(BAR),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left · {task.description}"),
            console=self._console,
            disable=not shown,
        )
        self._task = self._progress.add_task("", total=recipe.train.steps)

    def __enter__(self) -> TrainingView:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def step(self, line: Mapping[str, Any]) -> None:
        """Show one step's line of metrics.jsonl."""
        self._progress.update(
            self._task,
            completed=line["step"],
            description=f"loss {line['loss']:.3f} · {line['tokens_per_second']:,.0f} tok/s · "
            f"mfu {line['mfu']:.0%} · {line['memory_bytes'] / 2**20:,.0f} MiB",
        )
        if "val_loss" in line:
            self._console.print(f"  step {line['step']:4d} │ held out {line['val_loss']:.3f}")

    def warn(self, message: str) -> None:
        """Show a warning above the bar."""
        self._console.print(f"warning: {message}", markup=False, soft_wrap=True)

    def sample(self, trainer: Any) -> None:
        """Generate from the current weights, through the engine, at most every `every_seconds`.

        A collective over the tensor-parallel ranks of the model's first copy; other copies do nothing.
        """
        mesh = trainer.mesh
        if mesh.data.rank or mesh.tensor.broadcast(b"1" if self._is_time(trainer) else b"0") == b"0":
            return
        from headrace.engine.run.follower import GroupRanks, follow
        from headrace.engine.schedule.sampling import SamplingParams
        from headrace.llm.llm import LLM

        model = trainer.model.with_ops(self._ops)
        if mesh.tensor.rank:
            return follow(model, self._ops)
        ranks = GroupRanks(mesh.tensor) if mesh.tensor.size > 1 else None
        with LLM.from_model(model, trainer.tokenizer, self._ops, ranks, kv_cache_memory="16MiB") as llm:
            output = llm.generate(self._prompt or "", SamplingParams(temperature=0.0, max_tokens=40))[0]
        text = " ".join(f"{self._prompt}{output.outputs[0].text}".split())
        self._console.print(f"  step {trainer.steps:4d} │ {text}", markup=False, soft_wrap=True)
        self._last = time.monotonic()

    def _is_time(self, trainer: Any) -> bool:
        if time.monotonic() - self._last < self._every:
            return False
        if self._prompt is None:
            self._prompt = "".join(trainer.source.prompts(1))
        return bool(self._prompt)
