"""The table of what steps cost: from few, noisy and changing times."""

import random

import pytest

from headrace.speculate.costs import StepCosts


def noisy(curve, steps, rows, seed=0, noise=0.1):
    """A table after steps of random rows."""
    costs, draws = StepCosts(), random.Random(seed)
    for _ in range(steps):
        count = draws.choice(rows)
        costs.observe(count, curve(count) * (1 + draws.uniform(-noise, noise)))
    costs.check_integrity()
    return costs


def test_an_empty_table_is_false():
    costs = StepCosts()
    assert not costs
    costs.observe(3, 0.0)
    costs.seed(3, -1.0)
    assert not costs, "times that say nothing"
    costs.seed(3, 1.0)
    assert costs


def test_interpolates_between_and_goes_on_beyond():
    costs = StepCosts()
    for rows, seconds in {2: 1.0, 4: 1.2, 8: 2.0, 16: 4.0}.items():
        costs.seed(rows, seconds)
    assert costs.curve(2, 6) == pytest.approx([1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0])
    assert costs.curve(3, 0) == pytest.approx([1.1])
    assert costs.seconds(20) == pytest.approx(5.0)
    assert 0.5 < costs.seconds(1) < 1.0
    assert len(costs.curve(1, 40)) == len(costs.doubts(1, 40)) == 41


def test_a_row_beyond_the_table_is_never_free():
    costs = StepCosts()
    for rows in (1, 2, 4):
        costs.seed(rows, 1.0)
    assert costs.seconds(8) == pytest.approx(1.25)


def test_never_decreases_however_noisy():
    for seed in range(20):
        costs = noisy(lambda rows: 1.0 + rows / 50, 60, range(1, 60), seed=seed, noise=0.4)
        for rows, count in ((1, 100), (7, 20), (30, 1)):
            curve = costs.curve(rows, count)
            assert all(a <= b * (1 + 1e-12) for a, b in zip(curve, curve[1:]))
            assert min(curve) > 0


def test_learns_stairs_not_a_line():
    costs = noisy(lambda rows: 1.0 + (rows - 1) // 8, 1500, range(1, 33))
    for rows in range(1, 33):
        assert costs.seconds(rows) == pytest.approx(1.0 + (rows - 1) // 8, rel=0.06)


def test_many_rows_share_entries():
    costs = noisy(lambda rows: rows / 100, 3000, range(1, 2049))
    assert len(costs._rows) <= 64 + 5 * 32
    for rows in (65, 100, 333, 1000, 2000):
        assert costs.seconds(rows) == pytest.approx(rows / 100, rel=0.1)


def test_a_wrong_seed_is_mended_by_a_few_steps():
    costs = StepCosts()
    costs.seed(1, 1.0)
    costs.seed(4, 3.0)
    for _ in range(4):
        costs.observe(4, 1.2)
    assert costs.seconds(4) == pytest.approx(1.2, rel=0.05)
    costs.seed(4, 9.0)
    assert costs.seconds(4) == pytest.approx(1.2, rel=0.05), "a seed is for what was not seen"


def test_an_outlier_moves_little():
    costs = noisy(lambda rows: 1.0, 100, [4])
    before = costs.seconds(4)
    costs.observe(4, 500.0)
    assert costs.seconds(4) < 1.05 * before


def test_a_load_changes_all_entries():
    costs = noisy(lambda rows: 1.0 + rows / 10, 300, [1, 2, 4, 8])
    for load in (2.0, 0.7):
        draws = random.Random(1)
        for _ in range(40):
            costs.observe(2, 1.2 * load * (1 + draws.uniform(-0.1, 0.1)))
        assert costs.seconds(2) == pytest.approx(1.2 * load, rel=0.06)
        assert costs.seconds(8) == pytest.approx(1.8 * load, rel=0.2), "nobody has seen eight rows since"


def test_follows_a_slow_drift():
    costs = noisy(lambda rows: 1.0, 100, [4])
    draws = random.Random(1)
    for step in range(500):
        costs.observe(4, (1 + step / 500) * (1 + draws.uniform(-0.1, 0.1)))
    assert costs.seconds(4) == pytest.approx(2.0, rel=0.08)


def test_doubts_what_is_not_seen():
    costs = noisy(lambda rows: float(rows), 200, [1, 2, 8])
    seen, _, between, *_ = costs.doubts(1, 8)
    assert seen < 0.05 < between
    assert costs.doubts(20, 1) == pytest.approx([0.2, 0.2])
    for _ in range(2000):
        costs.observe(1, 1.0)
    assert costs.doubts(8, 0)[0] > 2 * costs.doubts(1, 0)[0], "long ago"


def test_explains_its_entries():
    costs = noisy(lambda rows: 1.0, 10, [4])
    known = costs.explain()
    assert known["steps"] == 10 and list(known["seconds"]) == [4]  # type: ignore[call-overload]
