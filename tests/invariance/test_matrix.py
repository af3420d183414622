"""The first law: the same bits in every cell. `make matrix` runs the full product."""

import pytest

from invariance.harness import AXES, Cell, first_difference, full_product, pairwise, run_cell

CELLS = pairwise(AXES)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(str(v) for v in vars(c).values()))
def test_same_bits(cell, folders, alone, worker):
    expected = alone(cell.model, cell.sampling)
    assert first_difference(expected, run_cell(cell, folders[cell.model], worker)) is None


def test_every_pair_is_covered():
    for a, b in ((a, b) for a in AXES for b in AXES if a < b):
        seen = {(getattr(c, a), getattr(c, b)) for c in CELLS}
        assert seen == {(x, y) for x in AXES[a] for y in AXES[b]}


@pytest.mark.matrix
@pytest.mark.parametrize("model", AXES["model"])
@pytest.mark.parametrize("sampling", AXES["sampling"])
def test_full_product(model, sampling, folders, alone, worker):
    expected = alone(model, sampling)
    wrong = []
    for cell in full_product({**AXES, "model": (model,), "sampling": (sampling,)}):
        difference = first_difference(expected, run_cell(cell, folders[model], worker))
        if difference is not None:
            wrong.append((cell, difference))
    assert wrong == []


def test_the_baseline_is_alone():
    assert Cell() == Cell("tinyworld", "greedy", 1, 4096, "cold", "never", 16, "forward", 2, False, 1)
