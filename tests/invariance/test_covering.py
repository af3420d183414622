"""Which cells run: every pair of values, every triple, and the same ones every time."""

import itertools

import pytest

from invariance.cells import AXES, Cell, values
from invariance.covering import covering, spread
from invariance.selection import PAIRS, TRIPLES, selected


def missing(rows, axes, strength):
    """The combinations of values of `strength` axes that stand in no row."""
    for names in itertools.combinations(axes, strength):
        seen = {tuple(row[name] for name in names) for row in rows}
        for combination in itertools.product(*(axes[name] for name in names)):
            if combination not in seen:
                yield dict(zip(names, combination))


def test_every_pair_is_covered():
    assert list(missing([vars(cell) for cell in PAIRS], values(costly=False), 2)) == []


def test_costly_values_stand_in_cells_of_their_own():
    assert AXES["ranks"].costly
    for name, axis in AXES.items():
        for value, changes in axis.costly.items():
            assert value != axis.values[0]
            assert len([cell for cell in PAIRS if getattr(cell, name) == value]) >= len(changes) > 0


def test_every_triple_is_covered():
    assert list(missing([vars(cell) for cell in TRIPLES], values(), 3)) == []


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), (1, 2, 3, 4), (3,) * 9, (4, 4, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2) + (3, 2) * 4]
)
def test_covering_arrays(sizes, strength):
    axes = {f"axis {i}": range(size) for i, size in enumerate(sizes)}
    rows = covering(axes, strength)
    assert list(missing(rows, axes, strength)) == []
    assert all(list(row) == list(axes) and all(row[name] in axes[name] for name in axes) for row in rows)
    assert rows == covering(axes, strength)


def test_covering_arrays_are_small():
    """The least is the product of the largest axes; the full product of these has 3**13 rows."""
    axes = {f"axis {i}": range(3) for i in range(13)}
    assert len(covering(axes, 2)) <= 25 and len(covering(axes, 3)) <= 100


def test_an_array_in_which_a_pair_is_missing_is_noticed():
    axes = {"a": (0, 1), "b": (0, 1)}
    assert list(missing(covering(axes, 2)[1:], axes, 2)) == [{"a": 0, "b": 0}]


def test_spreading_keeps_every_row():
    rows = covering(values(), 3)
    again = spread(rows)
    assert sorted(map(str, again)) == sorted(map(str, rows)) and again == spread(rows)


# ---- MATRIX_SAMPLE and MATRIX_SHARD ----------------------------------------------------------------------------------


def test_without_a_selection_all_triples_run():
    assert selected({}) == TRIPLES and len(set(TRIPLES)) == len(TRIPLES)


def test_shards_are_the_whole_and_share_nothing():
    shards = [selected({"MATRIX_SHARD": f"{i}/7"}) for i in range(1, 8)]
    assert sum(map(len, shards)) == len(TRIPLES) and set().union(*shards) == set(TRIPLES)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for shard in shards:
        assert all({getattr(cell, name) for cell in shard} == set(axis.values) for name, axis in AXES.items())


def test_a_sample_is_always_the_same_and_can_be_sharded():
    sample = selected({"MATRIX_SAMPLE": "50"})
    assert len(set(sample)) == len(sample) == 50 and sample == selected({"MATRIX_SAMPLE": "50"})
    assert set(selected({"MATRIX_SAMPLE": "20"})) < set(sample)
    halves = [selected({"MATRIX_SAMPLE": "50", "MATRIX_SHARD": f"{i}/2"}) for i in (1, 2)]
    assert set(halves[0]) | set(halves[1]) == set(sample) and not set(halves[0]) & set(halves[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("MATRIX_SHARD", value) for value in ("0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/999999999")),
        *(("MATRIX_SAMPLE", value) for value in ("0", "-1", "many", str(len(TRIPLES) + 1))),
    ],
)
def test_an_impossible_selection_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        selected({name: value})


def test_a_cell_is_named_by_what_is_not_plainest():
    assert str(Cell()) == "plainest" and str(Cell(load=16, chunk=7)) == "chunk=7 load=16"
