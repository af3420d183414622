"""Plots of a run: distributions of latencies, and the number of requests in flight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headrace.bench.serving import RequestRow

__all__ = ["in_flight", "write_plots"]

SIZE = (7.0, 4.0)
DPI = 120


def write_plots(rows: Sequence[RequestRow], folder: Path) -> list[Path]:
    """ttft.png, gaps.png and in_flight.png."""
    whole = [row for row in rows if row.failure is None]
    gaps = [gap * 1e3 for row in whole for gap in row.gaps]
    paths = [
        _cdf([row.ttft * 1e3 for row in whole if row.ttft is not None], "time to first token, ms", folder / "ttft.png"),
        _cdf(gaps, "time between tokens, ms", folder / "gaps.png"),
    ]
    figure, axes = _axes("seconds", "requests in flight")
    times, counts = in_flight(rows)
    axes.step(times, counts, where="post")
    axes.set_ylim(bottom=0)
    return [*paths, _save(figure, folder / "in_flight.png")]


def in_flight(rows: Sequence[RequestRow]) -> tuple[list[float], list[int]]:
    """(times, number of open requests from each time on), failed ones included."""
    changes = [(row.sent, 1) for row in rows if row.sent is not None]
    changes += [(row.end, -1) for row in rows if row.sent is not None and row.end is not None]
    times, counts, open_now = [0.0], [0], 0
    for time, change in sorted(changes):
        open_now += change
        times.append(time)
        counts.append(open_now)
    return times, counts


def _cdf(values: Sequence[float], label: str, path: Path) -> Path:
    figure, axes = _axes(label, "share of them")
    ordered = sorted(values)
    axes.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post")
    axes.set_ylim(0, 1)
    return _save(figure, path)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path
