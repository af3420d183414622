"""`headrace reproduce megatron` in small: its rows follow from what ranks saw, and a wrong bit is seen."""

import copy

import pytest

from headrace.reproduce.megatron import Machine, bits, counts, like_the_paper_s, run_ranks, scaling
from headrace.reproduce.table import Table

SETTING = {"layers": 2, "width": 32, "steps": 2, "rows": 2, "seq_length": 96}


@pytest.fixture(scope="module")
def answers():
    return {layout: run_ranks(*layout, SETTING) for layout in ((1, 1), (2, 2), (2, 1))}


def rows(part, *arguments):
    out = Table("title", "on")
    part(out, *arguments)
    return {row.what: row.ours for row in out.rows}


def test_collectives_are_counted(answers):
    told = rows(counts, answers, SETTING)
    assert told["All-reduces a layer, forward + backward"] == "2 + 2"
    recomputed = told["… with full recomputation, backward"]
    assert recomputed.startswith("3: ") and "; 4 where" in recomputed
    assert told["Elements of a message"] == "1·b·s·h" and told["Volume of an all-reduce"] == "2×"
    assert told["Bytes a rank sends in all of a pass, of the ring's 2(p−1)/p of every message"] == "1.000 at p = 2"
    assert told["Vocabulary-parallel cross-entropy"].startswith("9 scalars a target; ")


def test_bits_are_compared(answers):
    told = rows(bits, answers, 2)
    assert sum(ours.count("equal by ==") for ours in told.values()) == 7
    assert not any("NOT" in ours for ours in told.values())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rank: rank["gradients"].update({"model.norm.weight 0": "0"}),
        lambda rank: rank["curve"]["steps"][-1].__setitem__(0, 0.0),
        lambda rank: rank["curve"]["weights"].popitem(),
        lambda rank: rank.update(loss=rank["loss"] * (1 + 1e-15)),
        lambda rank: rank["start"].update({"model.norm.weight 0": "0"}),
        lambda rank: rank["dropout"]["masks"].__setitem__(3, "0"),
        lambda rank: rank["dropout"]["weights"].popitem(),
    ],
    ids=["gradient", "curve", "weights", "loss", "first weights", "mask", "weights after dropout"],
)
def test_one_wrong_bit_is_seen(answers, spoil):
    wrong = copy.deepcopy(answers)
    spoil(wrong[2, 2][1])
    told = rows(bits, wrong, 2)
    assert sum("NOT equal" in ours for ours in told.values()) == 1


def test_scaling_is_called_a_model(answers):
    told = rows(scaling, answers)
    weak = [ours for what, ours in told.items() if what.startswith("Weak scaling")]
    assert len(weak) == 2 and all(ours.startswith("a model, not a measurement: ") for ours in weak)


def test_the_model_of_a_machine():
    machine = Machine.fitted(2e9, 0.5, [[size, 1e-4 + size / 1e9] for size in (4e3, 6e4, 4e6)])
    assert machine.rate == 4e9
    assert machine.latency == pytest.approx(1e-4) and machine.bandwidth == pytest.approx(1e9)
    assert machine.sum_seconds(4e6, 1) == 0.0
    assert machine.sum_seconds(4e6, 2) == pytest.approx(1e-4 + 4e-3)
    assert machine.sum_seconds(4e6, 4) == pytest.approx(4e-4 + 6e-3)
    theirs = like_the_paper_s()
    ours = [theirs.efficiency(*size) for size in ((1536, 40, 1), (1920, 54, 2), (2304, 64, 4), (3072, 72, 8))]
    assert ours == pytest.approx([1.0, 0.95, 0.82, 0.77], abs=0.04)


def test_a_rank_that_fails_is_told(capfd):
    with pytest.raises(RuntimeError, match="a rank of 1 failed"):
        run_ranks(1, 1, {**SETTING, "layers": 0})
    assert "num_layers=0 must be an integer of at least 1" in capfd.readouterr().err
