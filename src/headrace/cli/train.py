"""`headrace train`: a recipe in, metrics and a Hugging Face folder out."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from headrace.cli.progress import kernels

__all__ = ["TrainingView", "add", "add_overrides"]


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train",
        help="train a model by a recipe",
        description="Train by a TOML recipe. Writes DIR/metrics.jsonl, a line a step, and DIR/hf/.",
    )
    parser.add_argument("recipe", type=Path, help="a TOML file, such as recipes/demo.toml")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to write; an earlier run is replaced"
    )
    add_overrides(parser)
    parser.set_defaults(run=run)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """--set, which changes fields of the recipe."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a field of the recipe, as train.steps=100; may be given again",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, with a progress bar and a sample now and then."""
    from headrace.train import tinyworld
    from headrace.train.config import load_recipe
    from headrace.train.trainer import train

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    ops = kernels(recipe.train.kernels)
    with TrainingView(recipe.train.steps, ops, tinyworld.prompts(1)[0]) as view:
        result = train(recipe, arguments.out, view.step, view.sample, ops=ops)
    print(
        f"loss {result.first_loss:.3f} → {result.final_loss:.3f}, held out {result.validation_loss:.3f}, "
        f"{result.tokens} tokens"
    )
    print(f"headrace generate {result.checkpoint} --prompt …")


class TrainingView:
    """A progress bar with the loss, and samples from the model as it learns. The trainer itself reads no clock."""

    def __init__(self, steps: int, ops: Any, prompt: str, every_seconds: float = 0.0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._ops = ops
        self._every = every_seconds
        self._prompt = prompt
        self._last = time.monotonic()
        self._tokens = 0
        self._began = time.monotonic()
        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=steps)

    def __enter__(self) -> TrainingView:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def step(self, record: Any) -> None:
        """Show one step's loss."""
        self._tokens += record.tokens
        speed = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self._progress.update(self._task, advance=1, description=f"loss {record.loss:.3f} · {speed:,.0f} tokens/s")

    def sample(self, model: Any, tokenizer: Any, step: int) -> None:
        """Generate from the model as it is, through the engine; at most every so many seconds."""
        if time.monotonic() - self._last < self._every:
            return
        from headrace.engine.llm import LLM
        from headrace.engine.sampling import SamplingParams

        llm = LLM.from_model(model.with_ops(self._ops), tokenizer, self._ops, kv_cache_memory="16MiB")
        output = llm.generate(self._prompt, SamplingParams(temperature=0.0, max_tokens=40))[0]
        text = " ".join(f"{self._prompt}{output.outputs[0].text}".split())
        self._console.print(f"  step {step:4d} │ {text}", markup=False, soft_wrap=True)
        self._last = time.monotonic()
