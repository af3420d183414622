"""The cells of `make test` and those of `make matrix`, all of them or what MATRIX_SAMPLE and MATRIX_SHARD leave."""

from __future__ import annotations

import re
from collections.abc import Mapping

from invariance.cells import AXES, Cell, values
from invariance.covering import covering, spread

__all__ = ["PAIRS", "TRIPLES", "selected"]

PAIRS = [Cell(**row) for row in covering(values(costly=False), 2)] + [
    Cell(**{**changes, name: value})
    for name, axis in AXES.items()
    for value, cells in axis.costly.items()
    for changes in cells
]
"""Every pair of values meets, but for costly values, which stand in a few cells of their own."""
TRIPLES = [Cell(**row) for row in spread(covering(values(), 3))]
"""Every triple of values meets, costly ones too. Any few neighbours are spread over all values of all axes."""


def selected(environment: Mapping[str, str]) -> list[Cell]:
    """The cells of `TRIPLES` to run.

    MATRIX_SAMPLE=k takes the first k: a larger sample contains a smaller one. MATRIX_SHARD=i/n, i from 1 to n, then
    takes the i-th of n equal parts. Raises `ValueError` for anything else.
    """
    cells = TRIPLES
    if sample := environment.get("MATRIX_SAMPLE"):
        if not re.fullmatch(r"\d+", sample) or not 1 <= int(sample) <= len(cells):
            raise ValueError(f"MATRIX_SAMPLE={sample} must be a number of cells from 1 to {len(cells)}")
        cells = cells[: int(sample)]
    if shard := environment.get("MATRIX_SHARD"):
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= len(cells):
            raise ValueError(f"MATRIX_SHARD={shard} must be i/n with i from 1 to n, and n at most {len(cells)}")
        i, n = int(match[1]), int(match[2])
        cells = cells[len(cells) * (i - 1) // n : len(cells) * i // n]
    return cells
