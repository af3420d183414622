"""What `bench/peers.py` has measured: a file of cells that survives an interruption, and the table made of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.bench.measure import Pairs, pairs
from peer_work import WORKLOADS

__all__ = ["Cell", "State", "markdown", "summary"]

Cell = tuple[int, str, str]
"""Round, side and workload."""


class State:
    """The cells measured so far, a JSON line each, of one set of settings.

    Every record is in the file when `add` returns. A line that a killed run left unfinished is dropped. A file with
    other settings is refused, as its cells are not comparable; settings of None take the file's own.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any] | None, fresh: bool = False) -> None:
        self.path = path
        self.cells: dict[Cell, dict[str, Any]] = {}
        self.neighbours: dict[tuple[float, int, str, str], dict[str, Any]] = {}
        """The cells with the run that measured them in front: a ratio is taken within one run only."""
        self.errors: dict[tuple[str, str], str] = {}
        self.rates: list[dict[str, Any]] = []
        lines = [] if fresh or not path.exists() else list(_whole_lines(path.read_text()))
        if settings is None and not lines:
            raise SystemExit(f"{path} has no cells: nothing is measured yet")
        first: dict[str, Any] = lines[0]["settings"] if lines else {}
        self.settings = first if settings is None else dict(settings)
        if lines and first != self.settings:
            changed = sorted(name for name in self.settings if first.get(name) != self.settings[name])
            raise SystemExit(f"{path} was measured with another {', '.join(changed)}: --fresh starts over")
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.new")
        whole.write_text("".join(json.dumps(line) + "\n" for line in lines or [{"settings": self.settings}]))
        whole.replace(path)
        for line in lines[1:]:
            self._take(line)

    def add(self, record: dict[str, Any]) -> None:
        """Append one record: a cell with its figures or its error, or the machine's rates at a round's edge."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        if "rates" in record:
            self.rates.append(record)
        elif "error" in record:
            self.errors[record["side"], record["workload"]] = record["error"]
        else:
            cell = record["turn"], record["side"], record["workload"]
            self.cells[cell] = self.neighbours[record["run"], *cell] = record
            self.errors.pop((record["side"], record["workload"]), None)

    def turns(self, side: str, workload: str) -> dict[int, dict[str, Any]]:
        """A side's figures of one workload, by round."""
        return {
            turn: cell for (turn, name, work), cell in sorted(self.cells.items()) if (name, work) == (side, workload)
        }


def _whole_lines(text: str) -> Iterable[dict[str, Any]]:
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def summary(state: State, sides: Mapping[str, Mapping[str, Any]], ours: str) -> dict[str, Any]:
    """{side: {**facts, "version", "cells": {workload: figures}, "peak_rss": bytes, "failed": {workload: reason}}}.

    `sides` gives each side's facts. A cell has its rates by round, their median, and the ratio of `ours` to it in the
    same rounds and runs.
    """
    found = {}
    for side, facts in sides.items():
        cells, peak, version = {}, 0, ""
        for workload in WORKLOADS:
            mine = state.turns(side, workload)
            if not mine:
                continue
            figures: dict[str, Any] = {"rates": [cell["rate"] for cell in mine.values()]}
            figures["median"] = statistics.median(figures["rates"])
            if all("decode" in cell for cell in mine.values()):
                figures["decode"] = statistics.median(cell["decode"] for cell in mine.values())
            beside = [(state.neighbours.get((c["run"], turn, ours, workload)), c) for turn, c in mine.items()]
            rates = [(our["rate"], cell["rate"]) for our, cell in beside if our]
            if rates and side != ours:
                figures["ratio"] = pairs(*zip(*rates))
            cells[workload] = figures
            peak = max(peak, *(cell.get("memory", 0) for cell in mine.values()))
            version = list(mine.values())[-1].get("version", version)
        failed = {work: why for (name, work), why in state.errors.items() if name == side}
        found[side] = {**facts, "version": version, "cells": cells, "peak_rss": peak, "failed": failed}
    return found


def markdown(rows: Mapping[str, Mapping[str, Any]], not_run: Mapping[str, str], workloads: Sequence[str]) -> str:
    """Lay the table out: tokens a second, decode alone in brackets, then our rate over the peer's with its range."""
    lines = [["side", "MB of weights a token", *workloads, "peak RSS, GiB"]]
    for name, row in rows.items():
        cells = [_cell(row, workload) for workload in workloads]
        lines.append([name, f"{row['weight_bytes'] / 1e6:.0f}", *cells, f"{row['peak_rss'] / 2**30:.1f}"])
    for name, why in not_run.items():
        lines.append([name, "", f"not run: {why.replace('|', '/')}", *[""] * len(workloads)])
    table = ["| " + " | ".join(line) + " |" for line in lines]
    table.insert(1, "|---" * len(lines[0]) + "|")
    failed = [f"{name}, {work} failed: {why}" for name, row in rows.items() for work, why in row["failed"].items()]
    return "\n".join([*table, *failed])


def _cell(row: Mapping[str, Any], workload: str) -> str:
    cell = row["cells"].get(workload)
    if cell is None:
        return "failed" if workload in row["failed"] else "–"
    digits = 0 if cell["median"] >= 100 else 1
    text = f"{cell['median']:.{digits}f}"
    if "decode" in cell:
        text += f" [{cell['decode']:.0f}]"
    ratio: Pairs | None = cell.get("ratio")
    return f"{text} · {ratio.verdict}" if ratio else text
