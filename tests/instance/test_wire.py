"""Messages keep their values through encoding, floats to the bit."""

import math

import msgspec
import pytest

from headrace.instance.wire import (
    Accepted,
    Add,
    ChoiceDelta,
    Delta,
    EventBatch,
    Explanation,
    StepReport,
    TokenEntry,
    Tree,
    decode_command,
    decode_event,
    encode,
)

TABLE = [TokenEntry(3, -math.pi / 7, 1, "é"), TokenEntry(4, -1e-300, 2, "\N{SNOWMAN}")]


def test_events_come_through_with_their_bits():
    choice = ChoiceDelta(1, "text", [3, 4], [TABLE, TABLE], -0.1 - 0.2, "stop", "end")
    news = [
        Accepted("1"),
        Delta("1", [choice], [None, TABLE], 5, True, Explanation(0.1, batch_sizes=[1, 2])),
        Tree("2", [(1, -1, 16, 2, "a")], complete=False),
        StepReport("0", {"steps": 1, "finished": {"stop": 2}}),
    ]
    assert decode_event(encode(EventBatch(news))) == EventBatch(news)


def test_commands_come_through():
    add = Add("1", [1, 2], {"logit_bias": {5: -1.5}, "seed": 2**64 - 1, "stop": ["a"]}, -3, ["tenant"])
    assert decode_command(encode(add)) == add


@pytest.mark.parametrize("data", [b"", b"\xc1", b"{}", encode(Accepted("1")), encode(Add("1", [], {}))[:-1]])
def test_what_is_no_command_is_refused(data):
    with pytest.raises(msgspec.DecodeError):
        decode_command(data)
