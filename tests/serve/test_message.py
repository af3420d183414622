"""`MessageReader` and what a stream makes of its parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.dialects.base import AnswerShape, Tool, ToolChoice
from headrace.dialects.choose import DIALECTS
from headrace.serve.protocol.message import MessagePart, MessageReader

TOOLS = (Tool("a", '{"type": "object"}'), Tool("b", '{"type": "object"}'))
TEXT = '[TOOL_CALLS][{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]'


def shape(name="mistral", choice=ToolChoice("auto")):
    return AnswerShape(DIALECTS[name], TOOLS, choice)


def joined(parts):
    """(content, reasoning, calls) of all parts."""
    calls: dict[int, dict[str, str]] = {}
    for call in (call for part in parts for call in part.calls):
        known = calls.setdefault(call["index"], {"arguments": ""})
        known |= {name: call[name] for name in ("id", "type") if name in call}
        known |= {"name": call["function"]["name"]} if "name" in call["function"] else {}
        known["arguments"] += call["function"]["arguments"]
    return "".join(p.content for p in parts), "".join(p.reasoning for p in parts), calls


@given(st.lists(st.integers(0, len(TEXT)), max_size=12))
def test_a_message_is_the_same_for_every_cut_and_a_chunk_goes_on_with_one_call(cuts):
    edges = [0, *sorted(cuts), len(TEXT)]
    pieces = [TEXT[a:b] for a, b in zip(edges, edges[1:])]
    reader, whole = MessageReader(shape(), "seed"), MessageReader(shape(), "seed")
    parts = [reader.take(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    split = [one for part in parts for one in part.one_call_each()]
    assert all(len(one.calls) <= 1 for one in split)
    expected = joined([whole.take(TEXT, True)])
    assert joined(parts) == joined(split) == expected
    assert [call["name"] for call in expected[2].values()] == ["a", "b"]
    assert [call["arguments"] for call in expected[2].values()] == ['{"x": 1}', "{}"]


def test_two_calls_in_one_text_are_two_chunks_and_content_comes_first():
    part = MessagePart("words", "thought", [{"index": 0}, {"index": 1}, {"index": 2}])
    first, *others = part.one_call_each()
    assert (first.content, first.reasoning, first.calls) == ("words", "thought", [{"index": 0}])
    assert [one.calls for one in others] == [[{"index": 1}], [{"index": 2}]]
    assert MessagePart("words").one_call_each() == [MessagePart("words")]


@pytest.mark.parametrize(
    ("choice", "reason"), [(ToolChoice("auto"), "tool_calls"), (ToolChoice("required", "a"), "stop")]
)
def test_the_finish_reason_says_whether_the_model_chose_to_call(choice, reason):
    reader = MessageReader(shape(choice=choice), "seed")
    reader.take(TEXT, True)
    assert reader.finish_reason("stop") == reason and reader.finish_reason("length") == "length"
