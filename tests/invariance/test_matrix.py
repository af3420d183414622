"""The first law: the same bits in every cell. `make matrix` runs the full product, or what is selected of it."""

import os
from itertools import islice

import pytest

from invariance.harness import AXES, Cell, first_difference, full_product, pairwise, run_cell
from invariance.selection import PRODUCT, cell_at, selected

QUICK = {**AXES, "ranks": (1, 2)}
FOUR_RANKS = [
    Cell("gqa-qknorm", "seeded", load=16, ranks=4),
    Cell("bf16", load=2, chunk=64, prefix="warm", ranks=4),
    Cell("tinyworld", "penalised", load=2, preemption="swap", depth=2, ranks=4),
]
"""More processes than a small machine has cores: few of them stand for all but in the full product."""
CELLS = [*pairwise(QUICK), *FOUR_RANKS]


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(str(v) for v in vars(c).values()))
def test_same_bits(cell, folders, alone, worker):
    expected = alone(cell.model, cell.sampling)
    assert first_difference(expected, run_cell(cell, folders[cell.model], worker)) is None


def test_every_pair_is_covered():
    for a, b in ((a, b) for a in QUICK for b in QUICK if a < b):
        seen = {(getattr(c, a), getattr(c, b)) for c in CELLS}
        assert seen >= {(x, y) for x in QUICK[a] for y in QUICK[b]}


def test_cells_have_numbers():
    assert list(map(cell_at, range(0, PRODUCT, 97))) == list(islice(full_product(AXES), 0, None, 97))
    assert sum(1 for _ in full_product(AXES)) == PRODUCT


def cells(**environment: str) -> list[Cell]:
    groups = selected(environment)
    assert all((cell.model, cell.sampling) == key for key, group in groups.items() for cell in group)
    return [cell for group in groups.values() for cell in group]


def test_shards_are_the_whole_and_share_nothing():
    shards = [cells(MATRIX_SHARD=f"{i}/7") for i in range(1, 8)]
    assert sum(map(len, shards)) == PRODUCT and len(set().union(*shards)) == PRODUCT
    for shard in shards:
        assert all({getattr(cell, axis) for cell in shard} == set(values) for axis, values in AXES.items())


def test_a_sample_is_always_the_same_and_can_be_sharded():
    sample = cells(MATRIX_SAMPLE="500")
    assert len(set(sample)) == len(sample) == 500 and sample == cells(MATRIX_SAMPLE="500")
    assert set(cells(MATRIX_SAMPLE="60")) < set(sample)
    assert set(cells(MATRIX_SAMPLE="500", MATRIX_SHARD="1/2")) | set(
        cells(MATRIX_SAMPLE="500", MATRIX_SHARD="2/2")
    ) == set(sample)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("MATRIX_SHARD", value) for value in ("0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/999999999")),
        *(("MATRIX_SAMPLE", value) for value in ("0", "-1", "many", str(PRODUCT + 1))),
    ],
)
def test_an_impossible_selection_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        selected({name: value})


def named(groups: dict[tuple[str, str], list[Cell]]) -> list:
    """How many cells there are stands in each test's name, for the report."""
    return [pytest.param(group, id=f"{'-'.join(key)}-{len(group)}") for key, group in groups.items()]


@pytest.mark.matrix
@pytest.mark.parametrize("group", named(selected(os.environ)))
def test_full_product(group, folders, alone, worker):
    expected = alone(group[0].model, group[0].sampling)
    wrong = []
    for cell in group:
        difference = first_difference(expected, run_cell(cell, folders[cell.model], worker))
        if difference is not None:
            wrong.append((cell, difference))
    assert wrong == []


def test_the_baseline_is_alone():
    assert Cell() == Cell("tinyworld", "greedy", 1, 4096, "cold", "never", 16, "forward", 2, False, 1)
