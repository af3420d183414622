"""`headrace reproduce zero` in small: the paper's cells by formula, ours by running, and a wrong bit is seen."""

import pytest

from headrace.reproduce.table import Table
from headrace.reproduce.zero import PUBLISHED, SETTINGS, bits, formula, table


def test_the_formulae_give_the_paper_s_table():
    for copies, published in PUBLISHED.items():
        for stage, gigabytes in enumerate(published, 1):
            assert 7.5 * formula(stage, copies) == pytest.approx(gigabytes, abs=0.06 if gigabytes > 2 else 0.006)


def test_every_row_is_measured():
    told = {row.what: row.ours for row in table(quick=True).rows}
    assert told["Stages train the same model"].startswith("losses, norms and weights equal by ==")
    assert told["Volume of a micro-step, P_os+g"].startswith("2.00Ψ; ")
    assert float(told["P_a: added traffic"].split("%")[0]) < 10
    assert told["P_a: checkpoints a rank keeps"] == "0.50; losses equal by =="
    assert "of 9Ψ at N = 2" in told["Bytes of states, P_os+g"] and SETTINGS[True]["layers"] == 4


def test_a_stage_with_other_bits_is_told():
    stages = [{"curve": [[1.0, 2.0]], "weights": "a"} for _ in range(4)]
    out = Table("title", "on")
    bits(out, {2: [{"stages": [*stages[:3], {"curve": [[1.0, 2.0]], "weights": "b"}]}]})
    assert out.rows[0].ours == "NOT equal"
