"""The grammar takes what models write in each format, and refuses calls that are wrong."""

import itertools
import json

import pytest
from llguidance import LLMatcher

from dialects.dialect_kit import (
    AUTO,
    BOTH,
    MARKS,
    NAMED,
    NONE,
    PARIS,
    REQUIRED,
    SEVERAL,
    TOOLS,
    WRITTEN,
    accepts,
    answer,
    matcher,
    shape_of,
    taken,
    vocabulary,
)
from headrace.dialects.base import AnswerShape, Tool
from headrace.dialects.choose import DIALECTS
from headrace.dialects.grammar import answer_constraint
from headrace.engine.schedule.constraint import Constraint
from headrace.errors import RequestError

CHOICES = {"auto": AUTO, "required": REQUIRED, "named": NAMED}
THOUGHT = {None: "", "may begin": "<think>\nIs it <tool or {?\n</think>\n\n", "begun": "\nSo.\n</think>\n\n"}
CELLS = list(itertools.product(DIALECTS, CHOICES, (True, False), THOUGHT, MARKS))


@pytest.mark.parametrize(("dialect", "choice", "parallel", "reasoning", "marks"), CELLS)
def test_what_models_write_is_accepted_and_read(dialect, choice, parallel, reasoning, marks):
    shape = shape_of(dialect, CHOICES[choice], parallel, reasoning)
    if shape.alone:
        cases = [(PARIS, [("get_weather", PARIS)])]
    else:
        several = SEVERAL.get(dialect, []) if not shape.once else []
        cases = WRITTEN[dialect] + [(text, BOTH) for text in several]
    for (written, calls), split in itertools.product(cases, (False, True)):
        text = THOUGHT[reasoning] + written
        assert accepts(shape, text, marks, split), text
        found = answer(shape, text)
        assert found.calls == calls
        assert found.content == ""
        assert found.reasoning == THOUGHT[reasoning].removeprefix("<think>").removesuffix("</think>\n\n").strip()


@pytest.mark.parametrize("dialect", SEVERAL)
@pytest.mark.parametrize("choice", [AUTO, REQUIRED])
@pytest.mark.parametrize("marks", MARKS)
def test_several_calls_are_refused_where_one_is_the_most(dialect, choice, marks):
    for text in SEVERAL[dialect]:
        assert accepts(shape_of(dialect, choice, parallel=True), text, marks)
        assert not accepts(shape_of(dialect, choice, parallel=False), text, marks)


def wrong(written: str) -> dict[str, str]:
    """One call of get_weather, made wrong."""
    return {
        "an unknown tool": written.replace("get_weather", "get_whether"),
        "a name's beginning": written.replace("get_weather", "get_"),
        "a missing argument": written.replace(PARIS, "{}"),
        "a value of another type": written.replace('"Paris"', "3"),
        "a value that is not listed": written.replace(PARIS, '{"city": "Paris", "unit": "fahrenheit"}'),
        "an argument too many": written.replace(PARIS, '{"city": "Paris", "county": ""}'),
        "a list too long": written.replace(PARIS, '{"city": "Paris", "days": [1, 2, 3, 4]}'),
        "arguments of another tool": written.replace("get_weather", "get"),
        "arguments as text": written.replace(PARIS, json.dumps(PARIS)),
        "no arguments": written.replace(PARIS, "null"),
        "text after it": written.rstrip() + " Done.",
        "half of it": written.rstrip()[:-1],
    }


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("choice", [AUTO, REQUIRED])
@pytest.mark.parametrize("marks", MARKS)
def test_a_wrong_call_is_refused(dialect, choice, marks):
    shape = shape_of(dialect, choice)
    for written, _ in WRITTEN[dialect]:
        for what, text in wrong(written).items():
            assert not accepts(shape, text, marks), what


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_named_tool_is_the_only_one(dialect):
    shape = shape_of(dialect, NAMED)
    for written, _ in WRITTEN[dialect]:
        assert not accepts(shape, written.replace("get_weather", "get").replace(PARIS, "{}"))
    assert not accepts(shape, "{}")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("choice", [REQUIRED, NAMED])
def test_a_demanded_call_is_the_whole_answer(dialect, marks, choice):
    shape = shape_of(dialect, choice)
    assert not matcher(shape, marks).is_accepting()
    for text in ("Hello", "It is {", "Let me see.\n" + WRITTEN[dialect][0][0]):
        count, length, _ = taken(shape, text, marks)
        assert count < length


FREE = [
    "",
    "Hello.",
    "  \n",
    "a < b",
    "<tool",
    "<tool_call",
    "[TOOL",
    "[]",
    "日本語 🎈",
    "</tool_call>",
    "x {",
    "<thin",
    "\n\n\n\n\n\n",
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("reasoning", THOUGHT)
def test_text_is_free_until_a_call_begins(dialect, marks, reasoning):
    shape = shape_of(dialect, AUTO, reasoning=reasoning)
    for text in FREE:
        whole = THOUGHT[reasoning] + text
        assert accepts(shape, whole, marks, split=True)
        found = answer(shape, whole)
        assert (found.content, found.calls) == (text.lstrip() if reasoning else text, [])


@pytest.mark.parametrize("dialect", ["hermes", "llama3", "mistral"])
@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("split", [False, True])
def test_a_call_may_follow_text(dialect, marks, split):
    shape = shape_of(dialect)
    marker = DIALECTS[dialect].opening[0]
    written = next(text for text, _ in WRITTEN[dialect] if text.startswith(marker))
    text = "Let me see [TOOL <tool: 1 < 2.\n" + written
    assert accepts(shape, text, marks, split)
    found = answer(shape, text)
    assert (found.content, found.calls) == ("Let me see [TOOL <tool: 1 < 2.", [("get_weather", PARIS)])
    # The marker is never text: what follows it is a call.
    assert not accepts(shape, f"I write {marker} so.", marks, split)
    assert not accepts(shape, f"I write {marker}", marks, split)


def test_a_message_of_llama_that_begins_with_a_brace_is_a_call():
    shape = shape_of("llama3")
    for text in ("{", ' {"a": 1}', '\n\n{"name": "Ada"}', "{}"):
        assert not accepts(shape, text)
    assert accepts(shape, 'It is {"a": 1}')


@pytest.mark.parametrize("marks", MARKS)
def test_other_special_tokens_are_not_text(marks):
    kit, _ = vocabulary(marks)
    for shape in (shape_of("hermes"), shape_of("mistral", reasoning="may begin")):
        found = matcher(shape, marks)
        assert found.consume_tokens(list(b"Hi"))
        assert found.validate_tokens([kit.special["<other>"]]) == 0
        assert found.validate_tokens([kit.eos_token_id]) == 1


def test_an_answer_ends_after_its_calls():
    """Space after them is no reason to call again."""
    text = WRITTEN["hermes"][0][0]
    for tail in ("", "\n", " ", "\n\n"):
        assert accepts(shape_of("hermes", REQUIRED), text + tail)
    assert not accepts(shape_of("hermes", REQUIRED), text + "\n<tool_call>")


BEGUN = shape_of("hermes", REQUIRED, reasoning="begun")


@pytest.mark.parametrize("marks", MARKS)
def test_reasoning_must_end_before_the_answer(marks):
    assert not accepts(BEGUN, WRITTEN["hermes"][0][0], marks)
    assert not accepts(BEGUN, "So.", marks)
    # What would be a call elsewhere is reasoning here, but no special token is.
    twice = WRITTEN["hermes"][0][0] + "</think>" + WRITTEN["hermes"][0][0]
    assert accepts(BEGUN, twice, marks, split=True)
    assert accepts(BEGUN, twice, marks) == (marks != "special")
    assert answer(BEGUN, twice).reasoning == WRITTEN["hermes"][0][0]
    may = shape_of("hermes", AUTO, reasoning="may begin")
    assert accepts(may, "No thought.", marks)
    assert not accepts(may, "<think>Endless", marks)
    assert accepts(may, "</think> is a tag", marks, split=True)


CONTENT = {
    "json_schema": (
        Constraint.json_schema({"type": "object", "properties": {"name": {"type": "string"}}}),
        '{"name": "Ada", "b": [{}]}',
    ),
    "json": (Constraint.json(), '{"name": "get", "age": 3}'),
    "regex": (Constraint.regex(r"[a/]+\/(b|\n)"), "a/a/\n"),
    "choice": (Constraint.choice(["yes", "yes!", 'no "/', "é\x7f\n"]), "yes!"),
    "lark": (Constraint.lark('start: "(" item ")"\nitem: "x"+ | start'), "((xx))"),
}


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("reasoning", THOUGHT)
@pytest.mark.parametrize("dialect", [None, *DIALECTS])
def test_constrained_content_stands_beside_reasoning_and_calls(kind, reasoning, dialect):
    content, text = CONTENT[kind]
    shape = AnswerShape(reasoning=reasoning, content=content)
    if dialect is not None:
        shape = shape_of(dialect, AUTO, reasoning=reasoning, content=content)
    elif reasoning is None:
        assert answer_constraint(shape, lambda _: None) is content
        return
    assert accepts(shape, THOUGHT[reasoning] + text)
    found = answer(shape, THOUGHT[reasoning] + text)
    assert (found.content, found.calls) == (text, [])
    assert not accepts(shape, THOUGHT[reasoning] + "Hello")
    assert not accepts(shape, THOUGHT[reasoning] + text + ".")
    for written, calls in WRITTEN.get(dialect or "", []):
        assert accepts(shape, THOUGHT[reasoning] + written)
        assert answer(shape, THOUGHT[reasoning] + written).calls == calls


def test_every_choice_can_be_chosen():
    content, _ = CONTENT["choice"]
    for text in json.loads(content.text):
        assert accepts(AnswerShape(reasoning="begun", content=content), "</think>" + text)


def test_nothing_constrains_an_answer_without_calls():
    for shape in (AnswerShape(), AnswerShape(reasoning="begun"), shape_of("hermes", NONE)):
        assert answer_constraint(shape, lambda _: None) is None


def test_the_options_of_content_hold_for_the_whole_grammar():
    content = Constraint.json_schema({}, whitespace="", strict=True)
    found = answer_constraint(AnswerShape(reasoning="begun", content=content), lambda _: None)
    assert found is not None and (found.whitespace, found.strict) == ("", True)


def test_schemas_too_long_are_refused_by_their_field():
    tool = Tool("f", json.dumps({"type": "object", "description": "x" * 300_000}))
    with pytest.raises(RequestError, match=r"^tools has 3") as caught:
        answer_constraint(AnswerShape(DIALECTS["hermes"], (tool,), AUTO), lambda _: None)
    assert caught.value.param == "tools"


def test_many_tools_have_one_grammar():
    tools = tuple(Tool(f"tool_{i}", TOOLS[i % 3].schema) for i in range(128))
    shape = AnswerShape(DIALECTS["hermes"], tools, AUTO)
    assert accepts(shape, '<tool_call>\n{"name": "tool_127", "arguments": {}}\n</tool_call>')
    assert not accepts(shape, '<tool_call>\n{"name": "tool_128", "arguments": {}}\n</tool_call>')


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("marks", MARKS)
def test_the_engine_compiles_it(dialect, marks):
    """As it compiles every grammar: each schema is checked, and written for llguidance."""
    engine = pytest.importorskip("headrace.grammar.text", exc_type=ImportError)
    kit, tokenizer = vocabulary(marks)
    for content in (None, Constraint.json_schema({"type": "object", "properties": {"name": {"type": "string"}}})):
        shape = shape_of(dialect, AUTO, reasoning="may begin", content=content)
        constraint = answer_constraint(shape, kit.special.get)
        assert constraint is not None
        compiled = LLMatcher(tokenizer, engine.grammar_text(constraint))
        assert not compiled.is_error(), compiled.get_error()
        for text, _ in WRITTEN[dialect]:
            found = compiled.deep_copy()
            assert found.consume_tokens(kit.ids("<think>Well.</think>\n" + text)) and found.is_accepting()
        if content is not None:
            assert compiled.consume_tokens(list(b'{"name": "Ada"}')) and compiled.is_accepting()
