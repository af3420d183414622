"""Interleaved pairs, and the machine's own rates.

A machine's speed drifts by tens of percents within an hour, so a ratio is taken only between neighbouring runs:
A B B A A B …, one ratio per pair, reported as the median with its range. A range that contains 1 is a tie.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["Pairs", "in_turn", "interleave", "machine", "pairs", "rates", "seconds", "write_results"]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Figures of two sides measured in turn, and the median, least and greatest ratio ours / theirs."""

    ours: list[float]
    theirs: list[float]
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "1.42× (1.38–1.47)", with "tie" where the range contains 1."""
        tie = ", tie" if self.low <= 1.0 <= self.high else ""
        return f"{self.ratio:.2f}× ({self.low:.2f}–{self.high:.2f}{tie})"


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(sides: Sequence[Callable[[], float]], rounds: int = 5, warm: int = 1) -> list[list[float]]:
    """Each side's figures, one per round; every other round runs in reverse order. A side returns its figure."""
    for _ in range(warm):
        for side in sides:
            side()
    found: list[list[float]] = [[] for _ in sides]
    numbers = range(len(sides))
    for i in range(rounds):
        for number in numbers if i % 2 == 0 else reversed(numbers):
            found[number].append(sides[number]())
    return found


def pairs(ours: Sequence[float], theirs: Sequence[float]) -> Pairs:
    """`Pairs` from the figures of the same rounds."""
    ratios = [x / y for x, y in zip(ours, theirs, strict=True)]
    return Pairs(list(ours), list(theirs), statistics.median(ratios), min(ratios), max(ratios))


def interleave(ours: Callable[[], float], theirs: Callable[[], float], rounds: int = 5, warm: int = 1) -> Pairs:
    """Measure two sides in turn, `rounds` times each, in alternating order."""
    return pairs(*in_turn((ours, theirs), rounds, warm))


def rates(threads: int, megabytes: int = 768, size: int = 2048, repeats: int = 5) -> dict[str, float]:
    """This machine's read bandwidth (GB/s, a sum over `megabytes`) and matrix rate (GFLOP/s, torch fp32)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(megabytes * 2**20 // 4)
        data.sum()
        read = [data.nbytes / seconds(data.sum) / 1e9 for _ in range(repeats)]
        a, b = torch.randn(size, size), torch.randn(size, size)
        torch.mm(a, b)
        matrix = [2 * size**3 / seconds(lambda: torch.mm(a, b)) / 1e9 for _ in range(repeats)]
    finally:
        torch.set_num_threads(before)
    return {"read_gb_s": statistics.median(read), "matrix_gflop_s": statistics.median(matrix)}


def machine() -> dict[str, Any]:
    """Processor, cores and versions, for a results file."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            cpu,
        )
    import os

    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numba", "llvmlite", "numpy")},
    }


def write_results(name: str, results: dict[str, Any], folder: Path = Path("docs/results")) -> Path:
    """Write `folder/name.json`, with the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1, default=_plain) + "\n")
    return path


def _plain(value: Any) -> Any:
    return (
        asdict(value)
        if hasattr(value, "__dataclass_fields__")
        else list(value)
        if isinstance(value, Sequence)
        else str(value)
    )
