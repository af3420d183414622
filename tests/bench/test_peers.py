"""The file of cells and the table of `bench/peers.py`, on figures made by hand."""

from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:  # no longer: names in bench/ are names of test folders too
    patch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    from peer_table import State, markdown, summary
    from peer_work import FULL, QUICK, WORKLOADS, figures, make_task

SETTINGS = {"threads": 2, "sizes": {"prompts": [32, 512]}}
FACTS = {name: {"weight_bytes": 200_000_000} for name in ("ours", "peer")}


def cell(turn, side, workload, rate, **more):
    return {"run": 1, "turn": turn, "side": side, "workload": workload, "rate": rate, "memory": 2**30, **more}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "cells.jsonl"


def test_a_run_goes_on_where_it_ended(path):
    first = State(path, SETTINGS)
    first.add({"turn": 0, "when": "before", "rates": {"read_gb_s": 20.0}})
    first.add(cell(0, "ours", "dec1", 50.0))
    first.add({"turn": 0, "side": "peer", "workload": "dec1", "error": "ended: killed"})
    second = State(path, SETTINGS)
    assert second.cells == first.cells and set(second.cells) == {(0, "ours", "dec1")}
    assert second.rates == first.rates and second.errors == {("peer", "dec1"): "ended: killed"}
    second.add(cell(0, "peer", "dec1", 40.0))
    assert State(path, SETTINGS).errors == {}
    assert State(path, SETTINGS).turns("peer", "dec1")[0]["rate"] == 40.0


def test_a_line_that_was_cut_off_is_measured_again(path):
    State(path, SETTINGS).add(cell(0, "ours", "dec1", 50.0))
    whole = path.read_text()
    State(path, SETTINGS).add(cell(0, "peer", "dec1", 40.0))
    for end in range(len(whole), len(path.read_text())):
        part = path.with_name("part.jsonl")
        part.write_text(path.read_text()[:end])
        state = State(part, SETTINGS)
        assert set(state.cells) == {(0, "ours", "dec1")}
        state.add(cell(0, "peer", "dec1", 41.0))
        assert State(part, SETTINGS).turns("peer", "dec1")[0]["rate"] == 41.0


def test_a_file_that_was_cut_off_in_its_first_line_begins_anew(path):
    path.parent.mkdir()
    path.write_text('{"settings": {"thr')
    State(path, SETTINGS).add(cell(0, "ours", "dec1", 50.0))
    assert set(State(path, SETTINGS).cells) == {(0, "ours", "dec1")}


def test_other_settings_are_refused_and_fresh_forgets(path):
    State(path, SETTINGS).add(cell(0, "ours", "dec1", 50.0))
    with pytest.raises(SystemExit, match="another threads: --fresh starts over"):
        State(path, SETTINGS | {"threads": 4})
    assert set(State(path, SETTINGS).cells) == {(0, "ours", "dec1")}
    assert State(path, SETTINGS | {"threads": 4}, fresh=True).cells == {}
    assert State(path, SETTINGS | {"threads": 4}).cells == {}
    assert State(path, None).settings["threads"] == 4
    with pytest.raises(SystemExit, match="nothing is measured yet"):
        State(path.with_name("none.jsonl"), None)


def test_medians_and_ratios_over_rounds_that_both_have(path):
    state = State(path, SETTINGS)
    for turn, (ours, peer) in enumerate([(50, 100), (60, 100), (70, 140), (80, None)]):
        state.add(cell(turn, "ours", "dec1", ours))
        if peer:
            state.add(cell(turn, "peer", "dec1", peer, memory=(turn + 1) * 2**30))
    rows = summary(state, FACTS, "ours")
    assert rows["ours"]["cells"]["dec1"] == {"rates": [50, 60, 70, 80], "median": 65}
    found = rows["peer"]["cells"]["dec1"]
    assert found["median"] == 100 and rows["peer"]["peak_rss"] == 3 * 2**30
    assert (found["ratio"].ratio, found["ratio"].low, found["ratio"].high) == (0.5, 0.5, 0.6)


def test_a_ratio_is_taken_between_cells_of_one_run(path):
    state = State(path, SETTINGS)
    state.add(cell(0, "ours", "dec1", 50.0))
    state.add(cell(0, "early", "dec1", 100.0))
    state.add(cell(0, "ours", "dec1", 30.0, run=2))
    state.add(cell(0, "peer", "dec1", 20.0, run=2))
    state.add(cell(0, "alone", "dec1", 20.0, run=3))
    rows = summary(State(path, SETTINGS), {name: {} for name in ("ours", "early", "peer", "alone")}, "ours")
    assert rows["early"]["cells"]["dec1"]["ratio"].ratio == 0.5
    assert rows["peer"]["cells"]["dec1"]["ratio"].ratio == 1.5
    assert "ratio" not in rows["alone"]["cells"]["dec1"] and rows["ours"]["cells"]["dec1"]["median"] == 30


def test_the_table_has_wins_losses_ties_failures_and_who_did_not_run(path):
    state = State(path, SETTINGS)
    for turn, rate in enumerate((100.0, 200.0)):
        for work, theirs in (("dec1", 200.0), ("dec16", 50.0), ("pre", 150.0)):
            more = {"decode": 300.0} if work == "dec16" else {}
            state.add(cell(turn, "ours", work, rate, **more))
            state.add(cell(turn, "peer", work, theirs * (turn + 1 if work == "dec1" else 1), **more))
    state.add({"turn": 0, "side": "peer", "workload": "shared", "error": "ended: no memory"})
    table = markdown(summary(state, FACTS, "ours"), {"third": "not installed: a|b"}, WORKLOADS)
    assert table.splitlines() == [
        "| side | MB of weights a token | dec1 | dec16 | pre | online | shared | peak RSS, GiB |",
        "|---|---|---|---|---|---|---|---|",
        "| ours | 200 | 150 | 150 [300] | 150 | – | – | 1.0 |",
        "| peer | 200 | 300 · 0.50× (0.50–0.50) | 50.0 [300] · 3.00× (2.00–4.00) | 150 · 1.00× (0.67–1.33, tie)"
        " | – | failed | 1.0 |",
        "| third |  | not run: not installed: a/b |  |  |  |  |  |",
        "peer, shared failed: ended: no memory",
    ]


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_tasks_have_the_same_lengths_and_new_tokens_in_every_round(sizes):
    for name in (*WORKLOADS, "warm"):
        assert make_task(name, sizes, 3) == make_task(name, sizes, 3)
        seen: set[tuple[int, ...]] = set()
        lengths = []
        for turn in range(2):
            task = make_task(name, sizes, turn)
            lengths.append([([len(p) for p in prompts], outputs) for prompts, outputs in task["calls"]])
            firsts = {tuple(prompt[:16]) for prompts, _ in task["calls"] for prompt in prompts}
            assert not firsts & seen
            seen |= firsts
            if name == "shared":
                [(prompts, _)] = task["calls"]
                assert (
                    len({tuple(prompt[: sizes.prefix]) for prompt in prompts}) == 1 and task["prefix"] == sizes.prefix
                )
        assert lengths[0] == lengths[1]


def test_figures_are_tokens_a_second():
    assert figures(make_task("dec1", FULL, 0), [0.5, 3.04]) == {"rate": pytest.approx(50)}
    assert figures(make_task("dec16", FULL, 0), [1.0, 8.0]) == {"rate": 256, "decode": pytest.approx(16 * 127 / 7)}
    assert figures(make_task("pre", FULL, 0), [2.0]) == {"rate": 512}
    [(_, outputs)] = make_task("online", FULL, 0)["calls"]
    assert len(outputs) == 32 and figures(make_task("online", FULL, 0), [10.0]) == {"rate": sum(outputs) / 10}
