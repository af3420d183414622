"""Beam search against a short reference, and with few blocks."""

import itertools

import pytest

from headrace.config import CacheConfig
from headrace.engine.engine import Engine
from headrace.engine.run.null_runner import NullRunner
from headrace.engine.schedule.beam import BeamSearch
from headrace.engine.schedule.config import SchedulerConfig
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.engine.schedule.scheduler import Scheduler

VOCAB = 11


def make(num_blocks=80, block_size=4, eos=(3,), **options):
    scheduler = Scheduler(
        SchedulerConfig(**options), CacheConfig(block_size=block_size, num_blocks=num_blocks), 64, eos
    )
    runner = NullRunner(num_blocks, block_size, vocab_size=VOCAB, check=True)
    return Engine(scheduler, runner, options.get("queue_depth", 1))


def search(engine, prompt, params, others=(), limit=2000):
    """Run one beam search beside other requests; returns its hypotheses."""
    ids = itertools.count(1000)
    beams = BeamSearch(engine.scheduler, Request(999, prompt, params), lambda: next(ids))
    for request in others:
        engine.scheduler.add(request)
    done = False
    for _ in range(limit):
        if not engine.has_work:
            break
        for update in engine.step():
            if update.group_id == beams.group_id:
                assert not done, "a beam goes on after the end"
                done = beams.take(update)
        engine.scheduler.check_integrity()
    assert done and not engine.has_work
    assert engine.scheduler.cache.available == engine.scheduler.cache.pool.num_usable
    return beams.hypotheses


def by_hand(prompt, params, eos=(3,)):
    """Beam search in ten lines, without caches or early end."""
    runner, width = NullRunner(2, 1, vocab_size=VOCAB), params.beam_width
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished = []
    for length in range(1, params.max_tokens + 1):
        step = []
        for index, (total, tokens) in enumerate(live):
            state = runner.state([*prompt, *tokens])
            ranked = sorted((-runner.logprob(state, t), t) for t in range(VOCAB))
            step += [(total - lp, index, rank, [*tokens, t]) for rank, (lp, t) in enumerate(ranked)]
        step.sort(key=lambda s: (-s[0], *s[1:3]))
        live = []
        for total, _, _, tokens in step:
            if len(live) == width:
                break
            if tokens[-1] in eos:
                if length > params.min_tokens:
                    finished.append((total, tokens, "stop"))
            else:
                live.append((total, tokens))
    finished += [(total, tokens, "length") for total, tokens in live]
    finished.sort(key=lambda f: -f[0] / len(f[1]) ** params.length_penalty)
    return finished[: params.n]


def summary(hypotheses):
    return [(round(h.cumulative_logprob, 9), h.token_ids, h.finish_reason) for h in hypotheses]


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("eos", [(3,), (1, 3, 5, 7)])
def test_beams_are_those_of_a_search_by_hand(width, penalty, eos):
    for seed in range(3):
        prompt = [seed, 4, 7, 1, 9, 2]
        params = SamplingParams(beam_width=width, n=width, max_tokens=7, min_tokens=seed, length_penalty=penalty)
        got = summary(search(make(eos=eos), prompt, params))
        expected = [(round(t, 9), tokens, reason) for t, tokens, reason in by_hand(prompt, params, eos)]
        assert got == expected


@pytest.mark.parametrize("blocks", [14, 18, 80])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preemption": "swap"},
        {"queue_depth": 2},
        {"max_num_batched_tokens": 3},
        {"max_num_seqs": 2},
        {"policy": "lpm"},
        {"policy": "priority"},
        {"batching": "orca"},
        {"batching": "static"},
        {"reserve": "oracle"},
    ],
    ids=str,
)
def test_beams_do_not_depend_on_the_schedule(blocks, options):
    prompt = list(range(9)) * 2
    params = SamplingParams(beam_width=4, n=3, max_tokens=20, length_penalty=1.0)
    others = [Request(i, [i, *prompt], SamplingParams(max_tokens=25)) for i in range(3)]
    got = search(make(blocks, **options), prompt, params, others)
    assert summary(got) == [(round(t, 9), tokens, r) for t, tokens, r in by_hand(prompt, params)]


def test_beams_share_their_prompt_and_copy_only_written_blocks():
    engine = make(300)
    params = SamplingParams(beam_width=4, n=4, max_tokens=12, ignore_eos=True)
    got = search(engine, list(range(10)) * 2, params)
    stats = engine.scheduler.stats
    assert [len(h.token_ids) for h in got] == [12] * 4 and [len(h.logprobs) for h in got] == [12] * 4
    assert stats.scheduled_tokens == 20 + 4 * 11  # every beam computes one token a step, and nothing twice
    assert 0 < stats.copied_blocks <= 4 * 11
    assert stats.finished == {"stop": 0, "length": 0, "abort": 0, "error": 0}


def test_scores_are_the_formula_and_records_add_up():
    params = SamplingParams(beam_width=3, n=3, max_tokens=6, length_penalty=0.7)
    for h in search(make(), [1, 2, 3], params):
        assert h.score == h.cumulative_logprob / len(h.token_ids) ** 0.7
        assert sum(r.logprob for r in h.logprobs) == pytest.approx(h.cumulative_logprob)
        assert [r.token_id for r in h.logprobs] == h.token_ids


def test_an_aborted_search_frees_everything():
    engine = make()
    ids = itertools.count(1000)
    beams = BeamSearch(
        engine.scheduler, Request(1, [1, 2, 3], SamplingParams(beam_width=4, max_tokens=30)), lambda: next(ids)
    )
    for _ in range(5):
        for update in engine.step():
            beams.take(update)
    assert len(beams.request_ids) == 4
    beams.abort()
    assert not engine.scheduler.has_unfinished and engine.scheduler.stats.physical_blocks == 0
