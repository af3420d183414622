"""Every way to write a conversation becomes the one form that templates expect, or is refused by its place."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import RequestError
from headrace.text.chat import ChatTemplate
from headrace.text.messages import read_messages, read_tools

ARGUMENTS = {"city": "Rome", "days": 1.0, "note": None}
CALL = {"type": "function", "function": {"name": "look", "arguments": ARGUMENTS}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def one(**message):
    [found] = read_messages([{"role": "assistant", **message}])
    return found


def called(**message):
    return one(**message)["tool_calls"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hello", "hello"),
        ("", ""),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "hello"}], "hello"),
        ([{"type": "text", "text": "one", "cache_control": {}}, {"type": "text", "text": "two"}], "one\ntwo"),
    ],
)
def test_content_is_a_text(content, text):
    assert one(content=content) == {"role": "assistant", "content": text}


def test_content_that_is_not_there_is_an_empty_text():
    assert one() == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("role", "name"), [("developer", "system"), ("system", "system"), ("function", "tool"), ("judge", "judge")]
)
def test_roles_have_the_names_that_templates_know(role, name):
    assert read_messages([{"role": role, "content": "a"}]) == [{"role": name, "content": "a"}]


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": json.dumps(ARGUMENTS)}}]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{**CALL, "id": None}], "function_call": None, "refusal": None},
        {"tool_calls": [{"name": "look", "arguments": json.dumps(ARGUMENTS)}]},
        {"function_call": {"name": "look", "arguments": json.dumps(ARGUMENTS)}, "tool_calls": []},
    ],
)
def test_a_call_has_its_arguments_as_an_object(message):
    assert called(content=None, **message) == [CALL]
    assert set(one(**message)) == {"role", "content", "tool_calls"}


NOTHING: tuple[Any, ...] = ("", " ", None, {})


@pytest.mark.parametrize("function", [{"name": "now", "arguments": none} for none in NOTHING] + [{"name": "now"}])
def test_a_call_without_arguments_has_an_empty_object(function):
    assert called(tool_calls=[{"id": "1", "function": function}]) == [
        {"id": "1", "function": {"name": "now", "arguments": {}}}
    ]


@pytest.mark.parametrize("calls", [None, [], "", "[]", "null"])
def test_a_message_without_calls_has_no_such_key(calls):
    assert one(content="a", tool_calls=calls, name=None) == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content"])
def test_reasoning_has_both_names_of_templates(name):
    found = one(content="a", **{name: "because"})
    assert found["thinking"] == found["reasoning_content"] == "because"


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        (TOOL,),
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [{"type": "function", "function": {"name": "look", "parameters": json.dumps(SCHEMA)}}],
    ],
)
def test_tools_are_a_list_of_objects(tools):
    assert read_tools(tools) == [TOOL]
    shown = ChatTemplate("{% for tool in tools %}{{ tool | tojson }};{% endfor %}")
    assert shown.render([{"role": "user"}], tools=tools) == json.dumps(TOOL) + ";"


@pytest.mark.parametrize("tools", [None, [], "", "\n", "[]", "null", ()])
def test_no_tools_are_none(tools):
    assert read_tools(tools) is None
    named = ChatTemplate({"default": "plain {{ tools is none }}", "tool_use": "tools"})
    assert named.render([{"role": "user", "content": "a"}], tools=tools) == "plain True"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("hi", r"messages\[1\] must be an object with a role"),
        ({"content": "a"}, r"messages\[1\] must be an object with a role"),
        ({"role": None, "content": "a"}, r"messages\[1\] must be an object with a role"),
        ({"role": "user", "content": 5}, r"messages\[1\]\.content must be text or a list of text parts, not int"),
        (
            {"role": "tool", "content": {"a": 1}},
            r"messages\[1\]\.content must be text or .*, not dict",
        ),
        ({"role": "user", "content": ["hi"]}, r"messages\[1\]\.content\[0\] is not a text part"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, r"messages\[1\]\.content\[0\] is not"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]},
            r"messages\[1\]\.content\[1\] is not a text part",
        ),
    ],
)
def test_a_message_that_has_no_such_form_is_named(message, says):
    with pytest.raises(RequestError, match=f"^{says}"):
        read_messages([{"role": "user", "content": "hi"}, message])


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (
            {"tool_calls": {"name": "look"}},
            r"tool_calls must be a list of calls, or .* one, not dict",
        ),
        ({"tool_calls": "call"}, r"tool_calls must be a JSON list, or text that holds one: not JSON: Expecting value"),
        ({"tool_calls": [None]}, r"tool_calls\[0\] must be an object, not NoneType"),
        ({"tool_calls": [CALL, {"type": "custom"}]}, r"tool_calls\[1\] must be a function with a name"),
        ({"tool_calls": [{"function": "look"}]}, r"tool_calls\[0\]\.function must be a function with a name"),
        ({"function_call": "auto"}, r"function_call must be a function with a name"),
        ({"function_call": {"name": "f"}, "tool_calls": [CALL]}, r"has tool_calls and function_call"),
    ],
)
def test_calls_that_have_no_such_form_are_named(message, says):
    with pytest.raises(RequestError, match=rf"^messages\[0\][. ]{says}"):
        one(**message)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("{city: Rome}", "must be a JSON object, or text that holds one: not JSON: Expecting property name"),
        ("[1]", "must be a JSON object, or text that holds one, not list"),
        ("5", "must be a JSON object, or text that holds one, not int"),
        (json.dumps(json.dumps(ARGUMENTS)), "must be a JSON object, or text that holds one, not str"),
        ('{"x": NaN}', "must be a JSON object, or text that holds one: not JSON: NaN is no JSON number"),
        ("[" * 100_000, "must be a JSON object, or text that holds one: not JSON"),
        ([1], "must be a JSON object, or text that holds one, not list"),
        (5, "must be a JSON object, or text that holds one, not int"),
    ],
)
def test_arguments_that_are_no_object_are_named(arguments, says):
    with pytest.raises(RequestError, match=rf"^messages\[0\]\.tool_calls\[0\]\.function\.arguments {says}"):
        one(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("look, then say", "tools must be a JSON list, or text that holds one: not JSON"),
        ('{"name": "look"}', "tools must be a list of tools, or JSON text that holds one, not dict"),
        (TOOL, "tools must be a list of tools, or JSON text that holds one, not dict"),
        (7, "tools must be a list of tools, or JSON text that holds one, not int"),
        ([TOOL, "look"], r"tools\[1\] must be a JSON object, or text that holds one: not JSON"),
        ([None], r"tools\[0\] must be an object that describes a tool: it is empty"),
        ([["look"]], r"tools\[0\] must be a JSON object, or text that holds one, not list"),
        (
            [{"function": {"name": "f", "parameters": "none"}}],
            r"tools\[0\]\.function\.parameters must be",
        ),
    ],
)
def test_tools_that_have_no_such_form_are_named(tools, says):
    with pytest.raises(RequestError, match=f"^{says}"):
        read_tools(tools)


@pytest.mark.parametrize("messages", [[], (), None, "hi", b"hi", {"role": "user"}, 5])
def test_what_is_no_list_of_messages_is_named_by_its_field(messages):
    with pytest.raises(RequestError, match=r"^talk must be a list of messages"):
        read_messages(messages, "talk")


PARTS = st.lists(st.builds(lambda text: {"type": "text", "text": text}, st.text(max_size=4)), max_size=3)
OBJECTS = st.dictionaries(st.sampled_from("abc"), st.none() | st.integers() | st.text(max_size=3), max_size=2)
CALLS = st.lists(
    st.builds(lambda a: {"function": {"name": "f", "arguments": a}}, OBJECTS | OBJECTS.map(json.dumps)), max_size=2
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])},
        optional={
            "content": st.none() | st.text(max_size=4) | PARTS,
            "tool_calls": st.none() | CALLS,
            "name": st.none() | st.just("n"),
            "reasoning": st.none() | st.text(max_size=2),
        },
    ),
    min_size=1,
    max_size=4,
)


@given(MESSAGES)
def test_the_form_stays_as_it_is_and_the_given_messages_too(messages):
    before = json.dumps(messages)
    found = read_messages(messages)
    assert json.dumps(messages) == before
    assert read_messages(found) == found
    assert all(isinstance(message["content"], str) for message in found)
