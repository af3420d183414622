"""`headrace reproduce speculative` in small: every row agrees with its formula, and a wrong one is told."""

import re

import pytest
import torch

from headrace.reproduce import speculative
from headrace.reproduce.speculative import chi_square, same_distribution, table
from headrace.reproduce.table import Table


def test_every_row_agrees():
    rows = table(quick=True).rows
    told, models = {row.what: row.ours for row in rows}, 0
    for row in rows:
        if row.what.endswith("c = 0: operations / speed"):
            assert row.ours == row.paper
        if row.what.startswith("α of"):
            formula, drawn = map(float, re.findall(r"0\.\d{3}", row.ours))
            assert drawn == pytest.approx(formula, abs=0.02)
        if row.paper.startswith("by formula") and not row.what.startswith("Wall time"):
            expected, measured = ([float(x) for x in re.findall(r"\d+\.\d+", text)] for text in (row.paper, row.ours))
            assert measured == pytest.approx(expected, rel=0.1)
            models += 1
        elif row.what.startswith("Tokens per step"):
            pairs = re.findall(r"([\d.]+), by formula ([\d.]+)", row.ours)
            assert len(pairs) == 2 and all(float(a) == pytest.approx(float(b), rel=0.05) for a, b in pairs)
        if row.what.startswith("χ²"):
            assert all(float(p) >= 0.01 for p in re.findall(r"[\d.]+", row.ours))
    assert told["The best γ(α, c), against all from 0 to 64"] == "equal in 2500 of 2500"
    assert told["Some γ is faster iff α > c, by (1 + α)/(1 + c) or more"].startswith("2500 of 2500; ")
    assert sum(row.kind == "G" for row in rows) == 2 and models == 3


def test_another_distribution_is_told(monkeypatch):
    monkeypatch.setattr(speculative, "residual", lambda p, q, lenience: p)
    out = Table("title", "on")
    same_distribution(out, 100)
    assert out.rows[0].ours.startswith("NOT equal")


def test_chi_square():
    expected = torch.tensor([50.0, 30.0, 20.0, 0.0])
    assert chi_square(torch.tensor([50, 30, 20, 0]), expected) == 1
    assert chi_square(torch.tensor([50, 30, 19, 1]), expected) == 0
    assert chi_square(torch.tensor([60, 30, 10, 0]), expected) == pytest.approx(0.030197, abs=1e-5)  # exp(−7/2)
