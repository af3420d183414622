"""Percentiles, goodput and the pictures' arithmetic, on rows made by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.plots import in_flight
from headrace.bench.serving import RequestRow
from headrace.bench.summary import goodput, spread, summarise, summary_text


def answer(sent, tokens_at, end, **fields):
    return RequestRow(
        fields.pop("scheduled", sent),
        10,
        len(tokens_at),
        sent=sent,
        tokens_at=list(tokens_at),
        end=end,
        output_tokens=len(tokens_at),
        **fields,
    )


def refusal(sent, kind="HTTP 429"):
    return RequestRow(sent, 10, 5, sent=sent, end=sent + 0.5, failure=kind, message="full")


def test_percentiles():
    assert spread([]) is None and spread([None]) is None
    assert spread([None, 3.0]) == {"mean": 3, "p50": 3, "p90": 3, "p99": 3, "max": 3}
    figures = spread(float(i) for i in range(101))
    assert figures == {"mean": 50, "p50": 50, "p90": 90, "p99": 99, "max": 100}


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_in_order(values):
    figures = spread(values)
    assert figures is not None
    assert min(values) <= figures["p50"] <= figures["p90"] <= figures["p99"] <= figures["max"] == max(values)


def test_goodput_counts_answers_within_both_limits_over_all_requests():
    rows = [
        answer(0, [0.1, 0.2, 0.3], 0.3),
        answer(0, [0.5, 0.6], 0.6),
        answer(0, [0.1, 0.5], 0.5),
        answer(0, [0.1], 0.1),
        refusal(0),
    ]
    assert goodput(rows, 2.0, None, None) is None
    assert goodput(rows, 2.0, 200, None) == {"requests": 3, "requests_per_second": 1.5, "share": 0.6}
    # One token has no time between tokens, so it is within any limit of it.
    within = goodput(rows, 2.0, None, 150)
    assert within is not None and within["requests"] == 3
    assert goodput(rows, 2.0, 200, 150) == {"requests": 2, "requests_per_second": 1.0, "share": 0.4}


def test_a_summary_adds_up():
    rows = [
        answer(1.0, [1.5, 1.7, 2.1], 2.2, scheduled=0.99),
        answer(2.0, [2.5], 3.0),
        refusal(3.0),
        refusal(3.5),
        refusal(0.0, "timeout"),
        RequestRow(9.0, 10, 5, end=10.0, failure="not sent"),
    ]
    rows[1].max_tokens = 4
    found = summarise(rows)
    assert (found["requests"], found["completed"], found["failed"], found["short"]) == (6, 2, 4, 1)
    assert found["failures"] == {"HTTP 429": 2, "timeout": 1, "not sent": 1}
    assert found["seconds"] == 10.0 and found["requests_per_second"] == 0.2
    assert found["output_tokens_per_second"] == 0.4 and found["prompt_tokens_per_second"] == 2.0
    assert found["ttft_ms"]["mean"] == pytest.approx(500) and found["latency_ms"]["max"] == pytest.approx(1200)
    assert found["gap_ms"]["mean"] == pytest.approx(300) and found["tpot_ms"]["mean"] == pytest.approx(300)
    assert found["client_late_ms"]["max"] == pytest.approx(10)
    text = summary_text(found)
    assert "2 of 6" in text and "2 × HTTP 429: full" in text and "1 × not sent" in text and "goodput" not in text


def test_a_summary_of_nothing_but_failures():
    found = summarise([refusal(0.0)], slo_ttft=1)
    assert found["ttft_ms"] is None and found["goodput"]["share"] == 0
    assert "0 of 1" in summary_text(found)


def test_requests_in_flight():
    times, counts = in_flight([answer(1.0, [1.5], 3.0), answer(2.0, [2.5], 4.0), RequestRow(5.0, 1, 1, end=6.0)])
    assert (times, counts) == ([0.0, 1.0, 2.0, 3.0, 4.0], [0, 1, 2, 1, 0])
