import json

import pytest

from headrace.cache.key import CacheKey
from headrace.config import CacheConfig, SchedulerConfig
from headrace.engine.engine import Engine
from headrace.engine.run.null_runner import NullRunner
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.engine.schedule.scheduler import Scheduler
from headrace.errors import RequestError


def fresh():
    scheduler = Scheduler(
        SchedulerConfig(max_num_batched_tokens=4), CacheConfig(block_size=4, num_blocks=40), 100, (3,)
    )
    return Engine(scheduler, NullRunner(40, 4, check=True))


def run(engine, steps=1000):
    tokens, scores = [], []
    for _ in range(steps):
        if not engine.has_work:
            break
        for update in engine.step():
            tokens += update.token_ids
            scores += [s.token_id for s in update.scores]
    return tokens, scores


PARAMS = SamplingParams(
    max_tokens=25,
    min_tokens=20,
    temperature=0.7,
    top_p=0.9,
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    logit_bias={7: 1.5},
    allowed_token_ids=tuple(range(60)),
    stop=("end",),
    stop_token_ids=(5,),
    prompt_logprobs=0,
)


@pytest.mark.parametrize("steps", range(0, 24, 3))
def test_a_record_continues_anywhere_with_equal_tokens(steps):
    prompt = list(range(10, 21))
    whole = fresh()
    whole.scheduler.add(Request(0, prompt, PARAMS, seed=11, choice=0, priority=2, cache_key=CacheKey(salt="salt")))
    expected = run(whole)
    first = fresh()
    request = Request(0, prompt, PARAMS, seed=11, priority=2, cache_key=CacheKey(salt="salt"))
    first.scheduler.add(request)
    tokens, scores = run(first, steps)
    record = json.loads(json.dumps(request.resume_record()))
    again = Request.from_record(77, record)
    assert again.params == PARAMS and again.cache_key == CacheKey(salt="salt") and again.priority == 2
    second = fresh()
    second.scheduler.add(again)
    more, more_scores = run(second)
    assert (tokens + more, scores + more_scores) == expected


def test_a_finished_record_is_refused():
    request = Request(0, [1, 2], SamplingParams(max_tokens=2), output_token_ids=[4, 5])
    with pytest.raises(RequestError, match="2 of 2 output tokens"):
        fresh().scheduler.add(Request.from_record(1, request.resume_record()))


@pytest.mark.parametrize("missing", ["token_ids", "params", "seed"])
def test_a_broken_record_is_refused(missing):
    record = Request(0, [1, 2], SamplingParams()).resume_record()
    del record[missing]
    with pytest.raises(RequestError, match=f"record is broken.*{missing}"):
        Request.from_record(1, record)


def test_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match="no tokens"):
        Request(0, [], SamplingParams())


def test_known_tokens_and_what_remains_of_them():
    request = Request(0, [1, 2, 3], SamplingParams(max_tokens=9), output_token_ids=[4])
    assert request.prompt_token_ids == [1, 2, 3] and request.output_token_ids == [4]
    assert request.num_tokens == 4 and request.num_output_tokens == 1 and request.remaining() == 4
    assert [(s.owner, s.start, s.blocks) for s in request.segments] == [(0, 0, [])]


def test_siblings_differ_in_their_choice_alone():
    root = Request(4, [1, 2], SamplingParams(n=2), seed=9, priority=1, cache_key=CacheKey(salt="x"))
    other = root.sibling(5, 1)
    assert (other.parent_id, other.group_id, other.seed, other.choice) == (4, 4, 9, 1)
    assert other.prompt_token_ids == [1, 2] and other.cache_key == CacheKey(salt="x")


def test_top_is_what_sampled_and_scored_tokens_need():
    assert Request(0, [1], SamplingParams()).top is None
    assert Request(0, [1], SamplingParams(logprobs=3)).top == 3
    assert Request(0, [1], SamplingParams(logprobs=3, prompt_logprobs=5)).top == 5
    assert Request(0, [1], SamplingParams(logprobs=3, prompt_logprobs=5), choice=1).top == 3
