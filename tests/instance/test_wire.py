"""Messages keep their values through encoding, floats to the bit."""

import math
from typing import Any

import msgspec
import pytest

from headrace.cache.key import CacheKey
from headrace.engine.schedule.sampling import SamplingParams
from headrace.instance.wire import (
    Accepted,
    Add,
    Delta,
    EngineEvent,
    EventBatch,
    Explanation,
    Resume,
    StepReport,
    Tree,
    decode_command,
    decode_event,
    encode,
)
from headrace.llm.outputs import CompletionOutput, Logprob, RequestOutput
from headrace.llm.records import ResumeRecord

TABLE = {3: Logprob(-math.pi / 7, 2, "é"), 4: Logprob(-1e-300, 1, "\N{SNOWMAN}")}


def test_events_come_through_with_their_bits():
    choice = CompletionOutput(1, "text", [3, 4], -0.1 - 0.2, [TABLE, TABLE], "stop", "end", [0])
    output = RequestOutput("1", None, [], [choice], True, [None, TABLE], 5, 3, 9, 7)
    news: list[EngineEvent] = [
        Accepted("1"),
        Delta(output, Explanation(0.1, batch_sizes=[1, 2])),
        Tree("2", [(1, -1, 16, 2, "a")], complete=False),
        StepReport("0", {"steps": 1, "finished": {"stop": 2}}),
    ]
    read = decode_event(encode(EventBatch(news)))
    assert isinstance(read, EventBatch) and read == EventBatch(news)
    assert isinstance(read.events[1], Delta) and read.events[1].output.outputs[0].accepted == [0]


def test_commands_come_through():
    add = Add(
        "1",
        [1, 2],
        SamplingParams(logit_bias={5: -1.5}, seed=2**64 - 1, stop=("a",), temperature=1, prediction=(7, 8)),
        -3,
        CacheKey(salt="tenant"),
    )
    assert decode_command(encode(add)) == add


RECORD = ResumeRecord.begin(
    "1", None, [1, 2], SamplingParams(n=2, seed=3, logprobs=1, prompt_logprobs=0), -3, CacheKey(salt="tenant"), "hr_1"
)


def test_a_record_comes_through_with_its_bits():
    record = RECORD.snapshot()
    assert record.output.prompt_logprobs is not None
    record.output.prompt_logprobs.append(TABLE)
    record.output.outputs[1] = CompletionOutput(1, "text", [3], -0.1 - 0.2, [TABLE], "stop", "end")
    again = decode_command(encode(Resume(record)))
    assert again == Resume(record) and again.name == "1"
    tables = again.record.output.outputs[1].logprobs
    assert tables is not None and list(tables[0]) == [3, 4]


def changed(command, *path, value):
    """The bytes of a command with one value changed."""
    data = msgspec.msgpack.decode(encode(command))
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return msgspec.msgpack.encode(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(Add("1", [], SamplingParams()), "params", "temperature", value=-1.0), r"temperature=-1\.0 must be"),
        (changed(Add("1", [], SamplingParams()), "params", "stop", value=[1]), "Expected `str`"),
        (changed(Resume(RECORD), "record", "params", "seed", value=None), "no seed"),
        (changed(Resume(RECORD), "record", "params", "n", value=3), r"n=3, and the choices are \[0, 1\]"),
        (changed(Resume(RECORD), "record", "output", "prompt_token_ids", value=["1"]), "Expected `int`"),
        (changed(Resume(RECORD), "record", "output", "outputs", 0, "logprobs", value=[{1: [2]}]), "of length 3, got 1"),
        (changed(Resume(RECORD), "record", value={}), "missing required field"),
    ],
)
def test_what_a_request_cannot_be_is_refused(data, message):
    with pytest.raises(msgspec.DecodeError, match=message):
        decode_command(data)


LONE_EVENT: Any = Accepted("1")
"""Events are sent in an `EventBatch`: by itself it is no command."""


@pytest.mark.parametrize("data", [b"", b"\xc1", b"{}", encode(LONE_EVENT), encode(Add("1", [], SamplingParams()))[:-1]])
def test_what_is_no_command_is_refused(data):
    with pytest.raises(msgspec.DecodeError):
        decode_command(data)
