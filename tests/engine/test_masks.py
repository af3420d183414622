"""Constrained requests under the scheduler: a toy grammar, whose outputs are those of a loop without a scheduler."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.test_scheduler import AXES, EOS, VOCAB, updates
from headrace.config import CacheConfig
from headrace.engine.engine import Engine
from headrace.engine.run.null_runner import NullRunner
from headrace.engine.schedule.config import SchedulerConfig
from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.mask import replay
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.engine.schedule.scheduler import Scheduler
from headrace.errors import RequestError


class ToyMask:
    """A language drawn from a key: behind each prefix one token, a few, perhaps an end token, or nothing may come.

    Of every fifth key nothing may come behind ten tokens, which only `fill` finds out.
    """

    def __init__(self, key: int, stop_ids: tuple[int, ...], tokens: tuple[int, ...] = ()) -> None:
        self.key, self.stop_ids, self.tokens = key, stop_ids, list(tokens)
        self.failed: str | None = None

    def choices(self, tokens: list[int]) -> list[int]:
        draw = random.Random(f"{self.key} {tokens}")
        if len(tokens) > 25 or draw.random() < 0.04:
            return []
        ordinary = [token for token in range(VOCAB) if token not in self.stop_ids]
        found = sorted(draw.sample(ordinary, 1 if draw.random() < 0.6 else draw.randrange(2, 12)))
        return found + (sorted(self.stop_ids) if len(found) > 1 and draw.random() < 0.2 else [])

    def exhausted(self, tokens: list[int]) -> bool:
        return self.key % 5 == 0 and len(tokens) > 9

    @property
    def ended(self) -> bool:
        return self.failed is None and not self.choices(self.tokens)

    def fill(self, words_W: np.ndarray) -> None:
        if self.exhausted(self.tokens):
            self.failed = "constraint: the toy has had enough"
        if self.failed is not None:
            words_W[:] = 0xFFFFFFFF
            return
        words_W[:] = 0
        for token in self.choices(self.tokens):
            words_W[token >> 5] |= np.uint32(1 << (token & 31))
        if not words_W.any():
            self.failed = "constraint: nothing may follow"
            words_W[:] = 0xFFFFFFFF

    def accept(self, tokens: Any) -> None:
        for token in tokens:
            if self.failed is not None:
                return
            right = token in self.choices(self.tokens) and token not in self.stop_ids
            self.tokens.append(token)
            if not right:
                self.failed = f"constraint: {token} is not allowed"

    def forced(self) -> list[int]:
        run: list[int] = []
        while len(run) < 7 and len(choices := self.choices(self.tokens + run)) == 1:
            run += choices
        return run

    def allows(self, tokens: Any) -> int:
        ahead = list(self.tokens)
        for token in tokens:
            late = token in self.stop_ids and ahead != self.tokens
            if self.failed or late or self.exhausted(ahead) or token not in self.choices(ahead):
                break
            ahead.append(token)
            if token in self.stop_ids:
                break
        return len(ahead) - len(self.tokens)

    def fork(self) -> ToyMask:
        twin = ToyMask(self.key, self.stop_ids, tuple(self.tokens))
        twin.failed = self.failed
        return twin


def toys(params: SamplingParams, stop_ids: Any) -> ToyMask:
    assert params.constraint is not None
    return ToyMask(int(params.constraint.text), tuple(stop_ids))


def make(num_blocks=64, caching=True, host_slots=0, masks=toys, **options):
    cache = CacheConfig(block_size=4, num_blocks=num_blocks, prefix_caching=caching)
    scheduler = Scheduler(SchedulerConfig(**options), cache, 256, (EOS,), host_slots, masks=masks)
    return Engine(scheduler, NullRunner(num_blocks, 4, host_slots, VOCAB, check=True), options.get("queue_depth", 1))


def workload(seed, count=10):
    draw = random.Random(seed)
    stem = [draw.randrange(VOCAB) for _ in range(30)]
    for i in range(count):
        params = SamplingParams(
            max_tokens=draw.randrange(1, 40),
            constraint=Constraint.regex(str(draw.randrange(1000))) if draw.random() < 0.8 else None,
            logprobs=draw.choice([None, 0, 2]),
            prompt_logprobs=draw.choice([None, None, 1]),
            jump_forward=draw.random() < 0.8,
            repetition_penalty=draw.choice([1.0, 1.5]),
        )
        prompt = stem[: draw.randrange(30)] + [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 12))]
        yield Request(i, prompt, params, seed=draw.randrange(9), priority=draw.randrange(3))


def copy_of(request, output=(), **changes):
    return Request(
        request.request_id,
        request.prompt_token_ids,
        request.params,
        seed=request.seed,
        choice=request.choice,
        priority=request.priority,
        output_token_ids=output,
        **changes,
    )


def run(engine, requests):
    """Tokens, log-probabilities, the prompt's scores and the end of each request."""
    out: dict[int, list[Any]] = {}
    for update in updates(engine, requests):
        got = out.setdefault(update.request_id, [[], [], [], None, None])
        assert got[3] is None, "an update after the end"
        got[0] += update.token_ids
        got[1] += update.logprobs
        got[2] += update.scores
        got[3:] = update.finish_reason, update.stop_reason
    return out


def alone(request):
    """A request by itself, in an engine where nothing is cut, cached or preempted."""
    return run(make(400, caching=False, max_num_batched_tokens=512), [copy_of(request)])[request.request_id]


def walk(request):
    """The output of a constrained request, from the null model without any scheduler."""
    runner, params = NullRunner(2, 1, vocab_size=VOCAB), request.params
    prompt = list(request.prompt_token_ids)
    output: list[int] = []
    mask = toys(params, (EOS,))
    while True:
        run_ = mask.forced() if params.jump_forward else []
        mask.accept(run_)
        room = params.max_tokens - len(output)
        output += run_[:room]
        if mask.ended and len(run_) <= room:
            return output, "stop"
        if len(output) >= params.max_tokens:
            return output, "length"
        words = np.zeros(4, np.uint32)
        mask.fill(words)
        if mask.failed:
            return output, "error"
        bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        output.append(runner.sample(runner.state(prompt + output), request.seed, 0, None, bits))
        if output[-1] == EOS:
            return output, "stop"
        mask.accept(output[-1:])
        if mask.ended:
            return output, "stop"


@pytest.mark.parametrize("seed", range(12))
def test_an_output_is_that_of_a_loop_without_a_scheduler(seed):
    for request in workload(seed):
        if request.params.constraint is not None and request.params.repetition_penalty == 1.0:
            tokens, _, _, reason, stop = alone(request)
            assert (tokens, reason) == walk(request)
            assert (stop is not None) == (reason == "error")


CASES = st.tuples(
    st.integers(0, 10**6), *(st.sampled_from(axis) for axis in AXES), st.sampled_from(["together", "stepwise"])
)


@settings(max_examples=40)
@given(CASES)
def test_outputs_do_not_depend_on_the_schedule(case):
    seed, policy, batching, reserve, preemption, depth, budget, blocks, caching, jump = case
    requests = list(workload(seed))
    expected = {r.request_id: alone(r) for r in requests}
    slots = 20 if preemption == "swap" else 0
    options = {
        "policy": policy,
        "batching": batching,
        "reserve": reserve,
        "preemption": preemption,
        "queue_depth": depth,
        "max_num_batched_tokens": budget,
        "jump_forward": jump,
    }
    engine = make(blocks, caching, slots, **options)
    fits = [r for r in requests if r.num_tokens + r.params.max_tokens <= engine.scheduler.max_model_len]
    got = run(engine, [copy_of(r) for r in fits])
    assert got == {r.request_id: expected[r.request_id] for r in fits}


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(["together", "stepwise"]), st.sampled_from([7, 64]))
def test_choices_of_one_prompt_are_those_of_single_requests(seed, jump, budget):
    for request in workload(seed, 3):
        engine = make(jump_forward=jump, max_num_batched_tokens=budget)
        siblings = [request.sibling(100 + i, i) for i in range(1, 4)]
        first = copy_of(request)
        got = run(engine, [first, *siblings])
        for one in (first, *siblings):
            assert got[one.request_id][0::3] == alone(one)[0::3]


def lengths(request, **changes):
    """Tokens of each update that has some."""
    params = replace(request.params, **changes)
    twin = Request(request.request_id, request.prompt_token_ids, params, seed=request.seed)
    engine = make()
    engine.scheduler.add(twin)
    found = []
    while engine.has_work:
        found += [len(update.token_ids) for update in engine.step()]
    return [count for count in found if count]


@pytest.mark.parametrize("seed", range(6))
def test_an_output_streams_alike_where_the_prompt_is_scored(seed):
    """Scores of the prompt hold no output tokens back."""
    for request in workload(seed):
        plain = lengths(request, logprobs=None, prompt_logprobs=None)
        assert lengths(request, logprobs=None, prompt_logprobs=1) == plain


def test_log_probabilities_are_one_a_token():
    seen = 0
    for seed in range(20):
        for request in workload(seed):
            tokens, logprobs, scores, _, _ = alone(request)
            if request.params.logprobs is not None:
                assert [record.token_id for record in logprobs] == tokens
                seen += len(tokens)
            if request.params.prompt_logprobs is not None:
                assert [record.token_id for record in scores] == request.prompt_token_ids[1:]
    assert seen > 100


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from(["together", "stepwise"]))
def test_a_request_goes_on_from_any_of_its_updates(seed, steps, jump):
    for request in workload(seed, 4):
        tokens, logprobs, _, reason, stop = alone(request)
        first = make(jump_forward=jump)
        first.scheduler.add(copy_of(request))
        given_, records, done = [], [], False
        for _ in range(steps):
            for update in first.step():
                given_ += update.token_ids
                records += update.logprobs
                done = done or update.finish_reason is not None
        if done or not given_:
            continue
        rest = run(make(jump_forward=jump), [copy_of(request, given_)])[request.request_id]
        assert (given_ + rest[0], rest[3:]) == (tokens, [reason, stop])
        if request.params.logprobs is not None:
            assert records + rest[1] == logprobs


def test_forced_tokens_are_computed_in_one_step_or_one_by_one():
    """The steps differ, the tokens do not; a step of several forced tokens counts as a decode, and is not cut."""
    many = (r for seed in range(99) for r in workload(seed) if r.params.constraint and r.params.jump_forward)
    request = next(r for r in many if len(alone(r)[0]) > 12)
    steps = {}
    for jump in ("together", "stepwise"):
        engine = make(jump_forward=jump)
        got = run(engine, [copy_of(request)])
        assert got[request.request_id] == alone(request)
        steps[jump] = engine.scheduler.stats.steps
        assert engine.scheduler.stats.forced_tokens > 3
    assert steps["together"] + 3 < steps["stepwise"]


def test_replaying_an_output_that_breaks_its_constraint_is_refused():
    request = next(r for seed in range(99) for r in workload(seed) if r.params.constraint and len(alone(r)[0]) > 3)
    tokens = alone(request)[0]
    mask = toys(request.params, (EOS,))
    wrong = next(token for token in range(VOCAB) if token not in mask.choices([]) and token != EOS)
    with pytest.raises(RequestError, match="does not satisfy its constraint"):
        replay(mask, [wrong, *tokens[1:]], request.params.jump_forward)


def test_an_engine_without_grammars_refuses_a_constraint():
    cache = CacheConfig(block_size=4, num_blocks=9)
    scheduler = Scheduler(SchedulerConfig(), cache, 256, (EOS,))
    with pytest.raises(RequestError, match="without grammars"):
        scheduler.add(Request(1, [5], SamplingParams(constraint=Constraint.regex("a"))))
    assert not scheduler.has_unfinished
