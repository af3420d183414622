"""Records: what they hold, how they are written and read, and which are refused."""

import json
import math
from dataclasses import replace

import pytest

from headrace.cache.key import CacheKey
from headrace.config import CacheConfig
from headrace.engine.engine import Engine
from headrace.engine.run.null_runner import NullRunner
from headrace.engine.schedule.config import SchedulerConfig
from headrace.engine.schedule.sampling import SamplingParams
from headrace.engine.schedule.scheduler import Scheduler
from headrace.errors import RequestError
from headrace.llm.outputs import Logprob
from headrace.llm.records import ResumeRecord

SALTED = CacheKey(salt="salt")


def fresh():
    scheduler = Scheduler(
        SchedulerConfig(max_num_batched_tokens=4), CacheConfig(block_size=4, num_blocks=40), 100, (3,)
    )
    return Engine(scheduler, NullRunner(40, 4, check=True))


def add(engine, record, number):
    [request] = record.requests([number], weights_version=5)
    engine.scheduler.add(request)
    return request


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
    seed=11,
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
    prediction=(20, 21, 22),
)


@pytest.mark.parametrize("steps", range(0, 24, 3))
def test_a_record_continues_anywhere_with_equal_tokens(steps):
    prompt = list(range(10, 21))
    record = ResumeRecord.begin("name", None, prompt, PARAMS, 2, SALTED, "hr_1")
    whole = fresh()
    add(whole, record, 0)
    expected = run(whole)
    first = fresh()
    add(first, record, 0)
    tokens, scores = run(first, steps)
    record.output.outputs[0].token_ids += tokens
    assert record.output.prompt_logprobs is not None
    record.output.prompt_logprobs += [{} for _ in scores]
    read = ResumeRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert read == record
    second = fresh()
    again = add(second, read, 77)
    assert again.params == PARAMS and again.cache_key == CacheKey(5, None, "salt") and again.priority == 2
    more, more_scores = run(second)
    assert (tokens + more, scores + more_scores) == expected


def plain(**changes):
    return ResumeRecord.begin("name", "text", [1, 2], SamplingParams(**changes))


def test_a_finished_record_is_refused():
    record = plain(max_tokens=2)
    record.output.outputs[0].token_ids = [4, 5]
    with pytest.raises(RequestError, match="2 of 2 output tokens"):
        add(fresh(), record, 1)


def test_a_record_without_a_seed_gets_one_and_keeps_it():
    assert plain().params.seed != plain().params.seed
    assert plain(seed=4).params.seed == 4


def test_json_keeps_every_bit_and_the_order_of_a_table():
    record = plain(n=2, logprobs=1, prompt_logprobs=1, seed=2**64 - 1, logit_bias={9: 0.1, 2: -1e-300})
    table = {7: Logprob(-math.pi / 7, 3, "\N{SNOWMAN}"), 2: Logprob(-math.inf, 1, "")}
    record.output.outputs[1].logprobs.append(table)
    record.output.prompt_logprobs.append(table)
    read = ResumeRecord.from_dict(json.loads(json.dumps(record.to_dict(), sort_keys=True)))
    of_prompt, of_output = read.output.prompt_logprobs, read.output.outputs[1].logprobs
    assert of_prompt is not None and of_output is not None
    assert read == record and of_prompt[0] is None
    assert list(of_output[0]) == [7, 2]
    assert isinstance(of_output[0][7], Logprob)


def test_a_snapshot_does_not_grow():
    record = plain(logprobs=0, prompt_logprobs=0)
    copy, before = record.snapshot(), record.to_dict()
    [choice] = record.output.outputs
    choice.token_ids.append(5)
    choice.logprobs.append({})
    choice.finish_reason = "stop"
    record.output.prompt_logprobs.append({})
    assert copy.to_dict() == before != record.to_dict()


def test_only_unfinished_choices_continue():
    record = plain(n=3, seed=1)
    record.output.outputs[1].finish_reason = "stop"
    assert [(r.request_id, r.choice) for r in record.requests([4, 5, 6], 0)] == [(4, 0), (6, 2)]
    search = plain(n=2, beam_width=2)
    assert [(r.request_id, r.choice) for r in search.requests([4, 5], 0)] == [(4, 0)]


@pytest.mark.parametrize(
    "path",
    [
        ("output", "prompt_token_ids"),
        ("output", "outputs"),
        ("output", "outputs", 0, "token_ids"),
        ("output", "prompt_logprobs"),
        ("params",),
        ("params", "seed"),
        ("cache_key",),
        ("fingerprint",),
    ],
)
def test_a_broken_record_is_refused(path):
    data = plain().to_dict()
    place = data
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    with pytest.raises(RequestError, match=f"record is broken.*{path[-1]}"):
        ResumeRecord.from_dict(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("output", "prompt_token_ids"), ["1"], "integers"),
        (("output", "outputs", 0, "token_ids"), "abc", "integers"),
        (("output", "outputs", 0, "token_ids"), None, "integers"),
        (("output", "outputs", 0, "index"), 1, r"choices are \[1\]"),
        (("output", "outputs", 0, "logprobs"), [[["a"]]], "broken"),
        (("output", "outputs"), [], r"n=1, and the choices are \[\]"),
        (("output", "surprise"), 1, "no field surprise"),
        (("params", "seed"), None, "no seed"),
        (("params", "temperature"), -1, "temperature=-1"),
        (("params", "logit_bias"), [[1]], "broken"),
        (("cache_key",), [0, None, "a", "b"], "broken"),
        (("params",), None, "broken"),
    ],
)
def test_a_record_with_a_wrong_value_is_refused(path, value, message):
    data = plain().to_dict()
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(RequestError, match=message):
        ResumeRecord.from_dict(data)


def test_params_without_a_seed_make_no_record():
    with pytest.raises(RequestError, match="no seed"):
        replace(plain(), params=SamplingParams())
