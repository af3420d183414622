"""Which cells of the full product `make matrix` runs: all of them, or what MATRIX_SAMPLE and MATRIX_SHARD leave.

All of them take many hours. A sample or a shard is spread over every axis, and is the same cells wherever it is run.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping

from invariance.harness import AXES, Cell

__all__ = ["PRODUCT", "cell_at", "selected"]

PRODUCT = math.prod(map(len, AXES.values()))
"""Cells that there are."""
SEED = 0


def cell_at(index: int) -> Cell:
    """Cell number `index` of the full product, in the order of `full_product`: the last axis turns fastest."""
    values = {}
    for name in reversed(AXES):
        index, place = divmod(index, len(AXES[name]))
        values[name] = AXES[name][place]
    return Cell(**values)


def selected(environment: Mapping[str, str]) -> dict[tuple[str, str], list[Cell]]:
    """(model, sampling) → the cells to run, which share one reference.

    MATRIX_SAMPLE=k takes k cells at random, always the same; a larger sample contains a smaller one. MATRIX_SHARD=i/n,
    i from 1 to n, then takes every n-th of them: the n shards together are the whole. Raises `ValueError` for
    anything else.
    """
    order = random.Random(SEED).sample(range(PRODUCT), PRODUCT)
    if sample := environment.get("MATRIX_SAMPLE"):
        if not re.fullmatch(r"\d+", sample) or not 1 <= int(sample) <= PRODUCT:
            raise ValueError(f"MATRIX_SAMPLE={sample} must be a number of cells from 1 to {PRODUCT}")
        order = order[: int(sample)]
    if shard := environment.get("MATRIX_SHARD"):
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= len(order):
            raise ValueError(f"MATRIX_SHARD={shard} must be i/n with i from 1 to n, and n at most {len(order)}")
        order = order[int(match[1]) - 1 :: int(match[2])]
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in map(cell_at, sorted(order)):
        groups.setdefault((cell.model, cell.sampling), []).append(cell)
    return groups
