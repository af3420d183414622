"""Every axis of the matrix has a mutant: something deliberately wrong that must turn it red.

Each mutant is a mistake that a serving engine could really make, and that does not change a request that runs alone.
"""

from __future__ import annotations

import pytest

from invariance.cells import AXES, Cell
from invariance.harness import chosen, finish, first_difference, run_alone, run_cell

MUTANTS = [
    pytest.param(mutant.mistake, mutant.values, id=f"{name}-{mutant.mistake.__name__}")
    for name, axis in AXES.items()
    for mutant in axis.mutants
]


@pytest.mark.parametrize(("mistake", "values"), MUTANTS)
def test_mutant_turns_its_axis_red(mistake, values, folders, alone, monkeypatch):
    """All in this process, where the mutant is."""
    cell = Cell(**values)
    assert first_difference(alone(cell), run_cell(cell, folders, finish)) is None
    mistake(monkeypatch)
    expected = run_alone(cell, folders, chosen(cell))
    assert first_difference(expected, run_cell(cell, folders, finish)) is not None


def test_every_axis_has_a_mutant():
    """An axis of the question needs none: its values have other tokens."""
    assert [name for name, axis in AXES.items() if not axis.question and not axis.mutants] == []
    for name, axis in AXES.items():
        assert all(mutant.values.get(name, axis.values[0]) != axis.values[0] for mutant in axis.mutants)
