"""The first law: the same bits in every cell. `make matrix` runs more cells."""

import os

import pytest

from invariance.cells import Cell
from invariance.harness import first_difference, run_cell
from invariance.selection import PAIRS, selected


@pytest.mark.parametrize("cell", PAIRS, ids=str)
def test_same_bits(cell, folders, alone, worker):
    assert first_difference(alone(cell), run_cell(cell, folders, worker.finish)) is None


@pytest.mark.matrix
@pytest.mark.parametrize("cell", selected(os.environ), ids=str)
def test_same_bits_in_triples(cell, folders, alone, worker):
    assert first_difference(alone(cell), run_cell(cell, folders, worker.finish)) is None


def test_the_plainest_cell_is_the_baseline():
    plainest = {
        "model": "tinyworld",
        "sampling": "greedy",
        "load": 1,
        "chunk": 4096,
        "prefix": "cold",
        "preemption": "never",
        "order": "forward",
        "resumed": False,
        "depth": 1,
        "ranks": 1,
    }
    assert vars(Cell()).items() >= plainest.items()
