"""`headrace plan`: the memory that a recipe needs on each device, and the layouts that fit."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cli.progress import warn
from headrace.cli.train import add_overrides
from headrace.typed import expanded

__all__ = ["add"]

WHAT, CELL = 24, 17
"""Widths of a table's first column and of the others."""


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "plan",
        help="bytes per device that a recipe needs, and what would fit",
        description="Compute the memory that a recipe needs on each device, without allocating it.",
    )
    parser.add_argument(
        "recipe", type=expanded, help="a TOML file, or the name of a recipe that comes with headrace, such as 7b"
    )
    add_overrides(parser)
    parser.add_argument(
        "--devices", type=int, metavar="N", help="number of devices (default: those of one copy of the model)"
    )
    parser.add_argument(
        "--memory",
        metavar="BYTES",
        help="memory of one device, as 80GiB (default: this machine's, shared by its devices)",
    )
    parser.add_argument(
        "--measured",
        type=expanded,
        metavar="RUN",
        help="a run of this model (its --out, or a snapshot): "
        "prints what its first rank held beside the plan of its layout",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Plan, and print the tables."""
    from headrace.config import require
    from headrace.llm.options import parse_bytes
    from headrace.train.config import load_recipe
    from headrace.train.paths import require_snapshots

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    tensor, devices = recipe.parallel.tensor, arguments.devices
    require(
        devices is None or devices >= tensor,
        f"--devices {devices} are fewer than parallel.tensor={tensor}: --set parallel.tensor=… to a smaller degree",
    )
    size = None if arguments.memory is None else parse_bytes(arguments.memory)
    require(size is None or size > 0, f"--memory {arguments.memory} must be more than 0")
    if arguments.measured is not None:
        require_snapshots(arguments.measured)
    from headrace.train.plan import Planner  # imports torch, which takes seconds

    memory = _machine(recipe.train.kernels) if size is None else _Memory(size, "--memory")
    planner = Planner(recipe)
    plan = planner.over(tensor, devices or tensor)[recipe.train.recompute]
    for line in (
        *_head(recipe, plan),
        *_moments(plan),
        *_kept(plan),
        *_verdict(plan, memory),
        "",
        *_stages(planner, plan),
        *_measured(recipe, arguments.measured),
        *_layouts(planner, devices, memory),
        *_largest(planner, plan, memory),
    ):
        print(line.rstrip())


@dataclass(frozen=True, slots=True)
class _Memory:
    size: int
    whose: str
    shared: bool = False
    """Whether all devices share it."""

    def each(self, devices: int) -> int:
        return self.size // devices if self.shared else self.size


def _machine(kernels: str) -> _Memory:
    import torch

    if kernels == "cuda" and torch.cuda.is_available():
        return _Memory(torch.cuda.get_device_properties(0).total_memory, "this machine's GPU")
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _Memory(whole, f"this machine's {_size(whole)}, shared by its processes", shared=True)


def _head(recipe: Any, plan: Any) -> Iterator[str]:
    model, train = recipe.model, recipe.train
    layout = f"zero {plan.zero}, {plan.tensor} tensor-parallel"
    layout += ", stream split by rows" if recipe.parallel.sequence else ""
    devices = _count(plan.tensor * plan.copies, "device", "devices")
    yield (
        f"{model.num_layers} layers of {model.hidden_size}, {model.dtype} weights; {devices}: {layout} × "
        f"{_count(plan.copies, 'copy', 'copies')}"
    )
    yield (
        f"a step of {train.batch_size} rows × {train.seq_length} tokens in {plan.parts} micro-batches of "
        f"{_count(plan.rows, 'row', 'rows')}; train.recompute = {plan.recompute!r}"
    )
    yield ""


def _moments(plan: Any) -> Iterator[str]:
    from headrace.train.plan import KINDS

    yield "bytes on the fullest device, at the moments of a step"
    yield f"{'':{WHAT}}" + "".join(f"{name:>{CELL}}" for name in plan.moments)
    for kind in KINDS:
        if any(account[kind] for account in plan.moments.values()):
            cells = (_size(account[kind]) if account[kind] else "·" for account in plan.moments.values())
            yield f"{kind:{WHAT}}" + "".join(f"{cell:>{CELL}}" for cell in cells)
    totals = (
        ("► " if name == plan.fullest else "") + _size(sum(account.values())) for name, account in plan.moments.items()
    )
    yield f"{'all':{WHAT}}" + "".join(f"{total:>{CELL}}" for total in totals)
    yield ""


def _kept(plan: Any) -> Iterator[str]:
    yield "activations kept for backward, all layers together"
    for name, size in plan.kept.items():
        yield f"  {name:{WHAT + 14}}{_size(size):>{CELL - 5}}"
    yield ""


def _verdict(plan: Any, memory: _Memory) -> Iterator[str]:
    each = memory.each(plan.tensor * plan.copies)
    yield f"{_size(plan.total)} {'fits' if plan.total <= each else 'does not fit'} into {_size(each)} ({memory.whose})"
    yield "Beside it: Python, torch and compiled kernels; samples and snapshots as they are made."


def _stages(planner: Any, plan: Any) -> Iterator[str]:
    """The paper's table for this model (ZeRO, figure 1), where there is more than one copy."""
    from headrace.train.plan import STATES

    if plan.copies == 1:
        return
    yield f"states per device, with {plan.copies} copies, at each of ZeRO's stages (parallel.zero)"
    yield f"{'':{WHAT}}" + "".join(f"{f'{stage}' + (' ◄' if stage == plan.zero else ''):>{CELL}}" for stage in range(4))
    parts = planner.ranks(plan.tensor)
    states = [
        max((part.state(plan.copies, stage) for part in parts), key=lambda state: sum(state.values()))
        for stage in range(4)
    ]
    for kind in STATES:
        yield f"{kind:{WHAT}}" + "".join(f"{_size(state[kind]):>{CELL}}" for state in states)
    yield f"{'all':{WHAT}}" + "".join(f"{_size(sum(state.values())):>{CELL}}" for state in states)
    yield ""


def _measured(recipe: Any, run: Path | None) -> Iterator[str]:
    """The memory that a run held, beside the plan of that run's layout."""
    from dataclasses import asdict, replace

    from headrace.errors import ConfigError
    from headrace.train.plan import STATES, Planner
    from headrace.train.snapshots.reader import find_snapshot

    if run is None:
        return
    snapshot = find_snapshot(run, warn)
    model = asdict(recipe.model)
    del model["eos_token_ids"]  # they come from the data's tokenizer
    snapshot.require_same({"model": model}, "model", "of another model")
    layout, held = dict(snapshot.record["layout"]), snapshot.record.get("memory")
    if held is None:
        raise ConfigError(
            f"--measured {run} has no record of its memory, as an older version wrote it: train a step more"
        )
    copies = layout.pop("copies")
    tensor, zero = layout["tensor"], layout["zero"]
    own = Planner(replace(recipe, parallel=replace(recipe.parallel, **layout))).ranks(tensor)[0].state(copies, zero)
    yield (
        f"held by the first rank of {snapshot.folder}: zero {zero}, {tensor} tensor-parallel × "
        f"{_count(copies, 'copy', 'copies')}"
    )
    yield f"{'':{WHAT}}{'planned':>{CELL}}{'measured':>{CELL}}"
    for kind in STATES:
        yield f"{kind:{WHAT}}{_size(own[kind]):>{CELL}}{_size(held[kind]):>{CELL}}"
    yield f"{'all':{WHAT}}{_size(sum(own.values())):>{CELL}}{_size(sum(held[kind] for kind in STATES)):>{CELL}}"
    for kind, size in held.items():
        if kind not in STATES and size:
            yield f"{kind:{WHAT}}{'·':>{CELL}}{_size(size):>{CELL}}"
    yield ""


def _layouts(planner: Any, devices: int | None, memory: _Memory) -> Iterator[str]:
    """Every degree with every recomputation; `devices` None means one copy of the model at every degree."""
    from headrace.errors import ConfigError
    from headrace.train.config import RECOMPUTE
    from headrace.train.plan import DEGREES

    asked, fitting = planner.recipe.train.recompute, None
    yield "bytes a device by layout and train.recompute (✓ fits)"
    yield f"{'tensor × copies':{WHAT}}" + "".join(f"{what:>{CELL}}" for what in RECOMPUTE)
    for tensor in DEGREES:
        count = devices or tensor
        try:
            plans = planner.over(tensor, count)
        except ConfigError as error:
            yield f"{tensor:<{WHAT}}  no: {error}"
            continue
        fits = {what: plan.total <= memory.each(count) for what, plan in plans.items()}
        cells = (_size(plan.total) + (" ✓" if fits[what] else "  ") for what, plan in plans.items())
        yield f"{f'{tensor} × {count // tensor}':{WHAT}}" + "".join(f"{cell:>{CELL}}" for cell in cells)
        if fitting is None and fits[asked]:
            fitting = tensor
    yield ""
    yield f"smallest degree that fits with train.recompute = {asked!r}: " + (
        f"parallel.tensor = {fitting}" if fitting else "none"
    )


def _largest(planner: Any, plan: Any, memory: _Memory) -> Iterator[str]:
    best = planner.greatest_micro_batch(plan.tensor, plan.copies, memory.each(plan.tensor * plan.copies))
    found = (
        "none"
        if best is None
        else (f"{_count(best.rows, 'row', 'rows')}, train.micro_batches = {best.parts}, {_size(best.total)}")
    )
    yield f"largest micro-batch that fits at parallel.tensor = {plan.tensor}: {found}"


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _size(size: int) -> str:
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
