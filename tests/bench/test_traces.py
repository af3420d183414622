"""Traces: read as they are, stretched as asked, and prompts that share what the trace says they share."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.traces import BLOCK_TOKENS, Prompts, TraceRow, fitting_scale, read_trace, schedule, synthetic
from headrace.errors import ConfigError

VOCAB = 1000


@st.composite
def rows(draw):
    """Two rows that share some leading hash ids and then part."""
    shared = draw(st.integers(0, 3))
    pair = []
    for own in (100, 200):
        blocks = shared + draw(st.integers(1, 3))
        ids = tuple(range(shared)) + tuple(range(own, own + blocks - shared))
        length = (blocks - 1) * BLOCK_TOKENS + draw(st.integers(1, BLOCK_TOKENS))
        pair.append(TraceRow(0.0, length, 1, ids))
    return shared, pair


@settings(deadline=None)
@given(rows(), st.sampled_from([1.0, 0.5, 0.1, 0.07]), st.integers(0, 2**32))
def test_lengths_are_exact_and_prompts_share_just_the_shared_blocks(case, scale, seed):
    shared, pair = case
    prompts = Prompts(VOCAB, seed, scale)
    a, b = (prompts.make(i, row) for i, row in enumerate(pair))
    for made, row in zip((a, b), pair):
        assert len(made) == prompts.lengths(row)[0] == max(1, round(row.input_tokens * scale))
        assert all(3 <= token < VOCAB for token in made)
    common = round(shared * BLOCK_TOKENS * scale)
    assert a[:common] == b[:common]
    # Where they part, 8 tokens are alike by chance once in 10^24.
    if min(len(a), len(b)) >= common + 8:
        assert a[common : common + 8] != b[common : common + 8]


@settings(deadline=None)
@given(st.integers(1, 2 * BLOCK_TOKENS), st.integers(1, 2 * BLOCK_TOKENS))
def test_a_block_that_is_cut_short_is_the_beginning_of_the_whole_one(short, long):
    prompts = Prompts(VOCAB)
    a, b = (prompts.make(i, TraceRow(0.0, n, 1, (7, 8))) for i, n in enumerate((short, long)))
    common = min(short, long)
    assert a[:common] == b[:common]


def test_a_synthetic_load_has_the_trace_s_lengths_and_fits():
    rows = synthetic(3000, seed=1)
    assert rows == synthetic(3000, seed=1) != synthetic(3000, seed=2)
    middle = sorted(row.input_tokens for row in rows)[1500]
    assert 950 < middle < 1100 and rows[-1].time == pytest.approx(3000, rel=0.1)
    assert all(a.time < b.time for a, b in zip(rows, rows[1:]))
    for longest in (2, 3, 17, 512, 5000):
        prompts = Prompts(scale=fitting_scale(rows, longest))
        assert all(sum(prompts.lengths(row)) <= longest for row in rows)
    assert max(sum(Prompts(scale=fitting_scale(rows, 512)).lengths(row)) for row in rows) > 0.85 * 512
    assert fitting_scale(rows, 10**6) == 1.0


def test_prompts_are_a_function_of_the_seed_and_rows_without_hashes_share_nothing():
    row = TraceRow(0.0, 40, 1)
    assert Prompts(VOCAB, 1).make(0, row) == Prompts(VOCAB, 1).make(0, row)
    assert Prompts(VOCAB, 1).make(0, row)[:8] != Prompts(VOCAB, 2).make(0, row)[:8]
    assert Prompts(VOCAB, 1).make(0, row)[:8] != Prompts(VOCAB, 1).make(1, row)[:8]
    assert len(Prompts(VOCAB).make(0, TraceRow(0.0, 600, 1, (5,)))) == 600
    assert Prompts(VOCAB, scale=0.001).lengths(TraceRow(0.0, 0, 3)) == (1, 1)


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
    st.floats(0.01, 100),
    st.floats(0.01, 100),
    st.none() | st.integers(1, 40),
)
def test_a_schedule_is_the_trace_stretched(times, rate, duration, most):
    trace = [TraceRow(t, 1, 1) for t in sorted(times)]
    try:
        plan = schedule(trace, rate, duration, most)
    except ConfigError as error:
        assert "the same time" in str(error)
        return
    at = [t for t, _ in plan]
    assert [row for _, row in plan] == trace[: len(plan)] and at == sorted(at) and at[0] == 0
    assert len(plan) <= max(1, rate * duration * (1 + 1e-9)) and len(plan) <= (most or len(plan))
    assert at[-1] <= duration * (1 + 1e-9)
    if len(plan) == len(trace) > 1:
        assert at[-1] == pytest.approx((len(plan) - 1) / rate)


def test_a_schedule_keeps_bursts():
    trace = [TraceRow(t, 1, 1) for t in (10, 10, 11, 14, 18)]
    assert [at for at, _ in schedule(trace, 2.0, 2.0)] == [0, 0, 0.25, 1.0]
    assert len(schedule(trace, 2.0, 2.0, max_requests=3)) == 3


def test_both_formats_are_recognised_by_content(tmp_path):
    azure, mooncake = tmp_path / "a.txt", tmp_path / "b.txt"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n"
    )
    first, second = read_trace(azure)
    assert (first.input_tokens, first.output_tokens, second.input_tokens) == (374, 44, 396)
    assert second.time - first.time == pytest.approx(4.314579, abs=1e-6)
    mooncake.write_text(
        "\n" + json.dumps({"timestamp": 1500, "input_length": 700, "output_length": 6, "hash_ids": [3, 4]}) + "\n"
    )
    assert read_trace(mooncake) == [TraceRow(1.5, 700, 6, (3, 4))]


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "is not a trace"),
        ("a,b,c\n1,2,3\n", "is not a trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", ":2 is not a request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1\n", ":2 is not a request"),
        ('{"timestamp": 0, "input_length": 1}\n', ":1 is not a request"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [-1]}\n', "negative"),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 1}\n', "finite"),
        ('{"timestamp": 0, "input_length": -1, "output_length": 1}\n', "negative"),
        ('{"timestamp"', ":1 is not a request"),
    ],
)
def test_what_is_not_a_trace_is_refused_with_its_place(tmp_path, text, says):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_trace(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0.0},
        {"rate": -1.0},
        {"rate": float("nan")},
        {"duration": 0.0},
        {"duration": float("inf")},
        {"max_requests": 0},
    ],
)
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        schedule([TraceRow(0.0, 1, 1)], **{"rate": 1.0, "duration": 1.0} | wrong)


@pytest.mark.parametrize("wrong", [{"vocab_size": 4}, {"seed": -1}, {"scale": 0.0}])
def test_impossible_prompts_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Prompts(**wrong)


def test_real_traces(data_dir):
    azure = read_trace(data_dir / "traces" / "azure2023" / "AzureLLMInferenceTrace_conv.csv")
    assert len(azure) > 19_000 and azure[0].input_tokens == 374
    mooncake = read_trace(data_dir / "traces" / "mooncake" / "synthetic_trace.jsonl")
    assert all(len(row.hash_ids) * BLOCK_TOKENS >= row.input_tokens for row in mooncake)
    assert len(schedule(mooncake, 5.0, 20.0)) == 100
