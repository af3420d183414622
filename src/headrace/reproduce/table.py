"""`Row` and `Table`: a paper's results beside headrace's."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

__all__ = ["CLASSES", "Row", "Table", "show"]

CLASSES = {
    "CE": "exact on a CPU",
    "CR": "a ratio or trend on a CPU",
    "G": "needs a GPU",
    "S": "by simulation",
    "X": "not claimed",
}
WIDTH = 34


@dataclass(frozen=True, slots=True)
class Row:
    """One result. `ours` is measured in this run, or is the reason why it is not."""

    what: str
    kind: str
    paper: str
    ours: str


@dataclass(slots=True)
class Table:
    """A paper's rows, and what they are measured `on`."""

    title: str
    on: str
    rows: list[Row] = field(default_factory=list)

    def add(self, what: str, kind: str, paper: str, ours: str) -> None:
        """Append a row; `kind` is a key of `CLASSES`, or "later"."""
        self.rows.append(Row(what, kind, paper, ours))


def show(table: Table) -> None:
    """Print the table in wrapped columns."""
    print(f"{table.title}\nours: {table.on}\n")
    rows = [Row("", "", "paper", "ours, measured now"), *table.rows]
    for i, row in enumerate(rows):
        cells = [textwrap.wrap(text, WIDTH) or [""] for text in (row.what, row.paper, row.ours)]
        for line in range(max(map(len, cells))):
            what, paper, ours = (cell[line] if line < len(cell) else "" for cell in cells)
            kind = row.kind if line == 0 else ""
            print(f"{kind:5} {what:{WIDTH}}  {paper:{WIDTH}}  {ours}".rstrip())
        print("-" * (3 * WIDTH + 10) if i == 0 else "")
    used = {row.kind for row in table.rows} & CLASSES.keys()
    print(" · ".join(f"{kind}: {text}" for kind, text in CLASSES.items() if kind in used))
