"""Training and decoding beside other processes that compute: what a busy machine makes of wall and CPU time.

    python bench/busy.py [--quick] [--rounds 3] [--before SRC]

Each side runs in turn on a quiet machine and beside 2 and 4 processes that only count, with two threads a side. Prints,
for each load, the wall time over the quiet one (slowdown) and the CPU time over the quiet one, of ours and of the peer:
torch's eager trainer, and `generate` of transformers. --before is the src folder of another headrace, for the quiet
speed and the slowdown of an earlier version. Writes docs/results/busy.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from headrace.bench.measure import in_turn, write_results
from headrace.bench.models import random_checkpoint
from sides import Side
from train import SCRIPT, SIZES, checkpoint, corpus
from workers import Side as Engine

LOADS = (0, 2, 4)
Measure = Callable[[], tuple[float, float]]
"""One run: its wall and its CPU seconds."""


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of a few steps, to try the script")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="the src folder of another headrace")
    parser.add_argument("--only", choices=("1m", "12m", "decode"), action="append")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.only or ("1m", "12m", "decode"):
            open_sides = decoders if name == "decode" else trainers
            with open_sides(Path(work), name, arguments.quick, arguments.before) as sides:
                results[name] = compare(name, sides, rounds)
    if not arguments.quick:
        print(f"\n{write_results('busy', results)}")


def compare(name: str, sides: dict[str, Measure], rounds: int) -> dict[str, Any]:
    """Every side at every load; medians, and their ratios to the quiet ones."""
    found: dict[str, Any] = {side: {} for side in sides}
    for load in LOADS:
        with loaded(load):
            walls: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}

            def measured(side: str, into: dict[str, list[tuple[float, float]]] = walls) -> float:
                into[side].append(sides[side]())
                return into[side][-1][0]

            in_turn([lambda side=side: measured(side) for side in sides], rounds)  # type: ignore[misc]
        for side, runs in walls.items():
            wall, cpu = (statistics.median(values) for values in zip(*runs[1:]))
            quiet = found[side].get("0", {"wall": wall, "cpu": cpu})
            one = {"wall": wall, "cpu": cpu, "slowdown": wall / quiet["wall"], "cpu_ratio": cpu / quiet["cpu"]}
            found[side][str(load)] = one
            print(
                f"{name:7} {side:13} beside {load}: {wall:7.2f} s ({one['slowdown']:5.2f}x)"
                f"  CPU {cpu:7.2f} s ({one['cpu_ratio']:5.2f}x)",
                flush=True,
            )
    return found


@contextmanager
def loaded(processes: int) -> Iterator[None]:
    """The context in which so many other processes count without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@contextmanager
def trainers(work: Path, name: str, quick: bool, before: Path | None) -> Iterator[dict[str, Measure]]:
    """Our trainer and torch's."""
    config, rows, tokens = SIZES[name]
    steps = 2 if quick else {"1m": 40, "12m": 4}[name]
    folder = checkpoint(work / name, corpus(work, config.vocab_size), config)
    words = (folder, corpus(work, config.vocab_size), rows, tokens, 2)
    sides = {"headrace": Side(SCRIPT, ("headrace", *words)), "torch": Side(SCRIPT, ("torch", *words))}
    if before is not None:
        with importing(before):
            sides["before"] = Side(SCRIPT, ("headrace", *words))

    def run(side: Side) -> tuple[float, float]:
        answer = side.run(steps)
        return sum(answer["seconds"]), answer["cpu"]

    with closing(sides.values()):
        yield {label: partial(run, side) for label, side in sides.items()}


@contextmanager
def decoders(work: Path, name: str, quick: bool, before: Path | None) -> Iterator[dict[str, Measure]]:
    """Our engine and transformers, one request of 128 tokens behind 128, on the small model."""
    folder = random_checkpoint("small", Path("runs/bench/small"))
    tokens = 8 if quick else 128
    sides = {kind: Engine(kind, folder, 2) for kind in ("headrace", "transformers")}
    if before is not None:
        with importing(before):
            sides["before"] = Engine("headrace", folder, 2)
    seeds = iter(range(1, 1_000_000))

    def run(side: Engine) -> tuple[float, float]:
        answer = side.run([(list(range(100, 228)), tokens)], next(seeds))
        return answer["seconds"], answer["cpu"]

    with closing(sides.values()):
        yield {label: partial(run, side) for label, side in sides.items()}


@contextmanager
def closing(sides: Iterable[Side | Engine]) -> Iterator[None]:
    """The context after which the sides' processes have ended."""
    try:
        yield
    finally:
        for side in sides:
            side.close()


@contextmanager
def importing(source: Path) -> Iterator[None]:
    """The context in which new processes import headrace from `source`."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(source.resolve())
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


if __name__ == "__main__":
    main()
