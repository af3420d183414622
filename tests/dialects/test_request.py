"""Tools and tool_choice of a request are read, or refused with the place of the fault."""

import json
from typing import Any

import pytest

from dialects.dialect_kit import TOOLS
from headrace.dialects.base import ToolChoice
from headrace.dialects.request import described_tools, read_tool_choice
from headrace.errors import RequestError
from headrace.text.messages import read_tools

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def described(*functions):
    return described_tools(read_tools([{"type": "function", "function": function} for function in functions]))


def test_tools_have_names_and_schemas():
    schema = {"type": "object", "properties": {"näme": {"type": "string"}}}
    [first, second, third] = described(
        {"name": "a.b-C_1", "description": "x", "parameters": schema},
        {"name": "b"},
        {"name": "c", "parameters": json.dumps(schema)},
    )
    assert (first.name, json.loads(first.schema)) == ("a.b-C_1", schema)
    assert (second.name, json.loads(second.schema)) == ("b", NOTHING)
    assert json.loads(third.schema) == schema
    assert described_tools(read_tools([{"name": "bare", "parameters": schema}]))[0].name == "bare"
    assert described_tools(None) == ()


def test_arguments_are_an_object():
    nothing: tuple[Any, ...] = ({}, None)
    for parameters in nothing:
        assert json.loads(described({"name": "f", "parameters": parameters})[0].schema) == NOTHING
    kinds: tuple[dict[str, Any], ...] = ({}, {"type": ["object", "null"]})
    for kind in kinds:
        found = json.loads(described({"name": "f", "parameters": {**kind, "properties": {"a": {}}}})[0].schema)
        assert found == {"properties": {"a": {}}, "type": "object"}


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([{"name": "f"}, {"name": "f"}], r"tools\[1\] has the name of another tool: f"),
        ([{"name": "a b"}], r"tools\[0\] needs a name of 1 to 64 letters, digits, _, - and ., not 'a b'"),
        ([{"name": "x" * 65}], r"tools\[0\] needs a name"),
        ([{"name": ""}], r"tools\[0\] needs a name"),
        ([{"name": "f\n"}], r"tools\[0\] needs a name"),
        ([{"description": "x"}], r"tools\[0\] needs a name .*, not nothing"),
        ([{"name": "f", "parameters": [1]}], r"tools\[0\].function.parameters must be a JSON schema, an object"),
        (
            [{"name": "f", "parameters": {"type": "string"}}],
            r'must describe an object: its type is string, not "object"',
        ),
        ([{"name": "f", "parameters": {"default": float("nan")}}], r"is not plain JSON"),
        ([{"name": f"f{i}"} for i in range(129)], r"tools has 129 tools: at most 128"),
    ],
)
def test_wrong_tools_are_refused(functions, message):
    with pytest.raises(RequestError, match=message) as caught:
        described(*functions)
    assert caught.value.param == "tools"


def test_other_kinds_of_tools_are_refused():
    with pytest.raises(RequestError, match=r"tools\[0\].type is web_search: only functions can be called"):
        described_tools([{"type": "web_search", "function": {"name": "f"}}])


@pytest.mark.parametrize(
    ("value", "choice"),
    [
        (None, ToolChoice("auto")),
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "get"}}, ToolChoice("required", "get")),
    ],
)
def test_tool_choice(value, choice):
    assert read_tool_choice(value, TOOLS) == choice


def test_without_tools_none_is_chosen():
    assert [read_tool_choice(value, ()).mode for value in (None, "auto", "none")] == ["none"] * 3


@pytest.mark.parametrize(
    ("value", "tools", "message"),
    [
        ("required", (), "tool_choice is required, but tools has none"),
        ("any", TOOLS, "tool_choice must be none, auto, required or {"),
        (True, TOOLS, "tool_choice must be"),
        (["auto"], TOOLS, "tool_choice must be"),
        ({"type": "function"}, TOOLS, "tool_choice must be"),
        ({"type": "tool", "function": {"name": "get"}}, TOOLS, "tool_choice must be"),
        ({"type": "function", "function": {"name": "gone"}}, TOOLS, "names gone, which is not one of tools"),
    ],
)
def test_a_wrong_tool_choice_is_refused(value, tools, message):
    with pytest.raises(RequestError) as caught:
        read_tool_choice(value, tools)
    assert message in str(caught.value)
    assert caught.value.param == "tool_choice"


def test_fields_go_by_the_caller_s_names():
    with pytest.raises(RequestError) as caught:
        read_tool_choice("required", ())
    renamed = caught.value.renamed({"tool_choice": "function_call", "tools": "functions"})
    assert str(renamed) == "function_call is required, but functions has none"
