"""The parser gives the same parts however the text arrives, and loses nothing of a text that is broken."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dialects.dialect_kit import (
    AUTO,
    NAMED,
    NONE,
    PARIS,
    REQUIRED,
    SEVERAL,
    TOOLS,
    WRITTEN,
    answer,
    parse,
    shape_of,
)
from headrace.dialects.base import AnswerShape, ReasoningStart
from headrace.dialects.choose import DIALECTS
from headrace.dialects.parser import AnswerParser, Arguments, CallStart, Content, Reasoning
from headrace.engine.schedule.constraint import Constraint
from headrace.text.tokenizer import Tokenizer

RECORDED = {name: [text for text, _ in WRITTEN[name]] + SEVERAL.get(name, []) for name in DIALECTS}
REASONINGS: tuple[ReasoningStart | None, ...] = (None, "may begin", "begun")
SHAPES = [
    shape_of(dialect, choice, parallel, reasoning, content)
    for dialect in DIALECTS
    for choice in (AUTO, NAMED)
    for parallel in (True, False)
    for reasoning in REASONINGS
    for content in (None, Constraint.json())
] + [AnswerShape(reasoning=reasoning) for reasoning in REASONINGS]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("lead", ["", "<think>\nWell </th.\n</think>\n\n", "See: <tool_c [TOOL {\n\n"])
def test_two_pieces_are_as_good_as_one(dialect, lead):
    for text in (lead + written for written in RECORDED[dialect]):
        shape = shape_of(dialect, AUTO, reasoning="may begin")
        whole = parse(shape, [text])
        assert parse(shape, text) == whole
        for cut in range(1, len(text)):
            assert parse(shape, [text[:cut], text[cut:]]) == whole


FRAGMENTS = st.one_of(
    st.sampled_from([text for texts in RECORDED.values() for text in texts]),
    st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<think>", "</think>"]),
    st.sampled_from(
        ["<tool", "[TOOL_", "<|py", "</thi", "<", "[", "{", "}", ";", ",", "]", '"', "\\", "\n", "  ", "}}"]
    ),
    st.sampled_from(
        ['{"name": "get", "', '{"name": "get_weather", "arguments": {"city": "', '{"name": "nobody"', "🎈é"]
    ),
    st.text(max_size=4),
)
TEXTS = st.lists(FRAGMENTS, max_size=8).map("".join)


def cut(text, places):
    ends = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(ends)]


@given(st.sampled_from(SHAPES), TEXTS, st.lists(st.integers(0, 1000), max_size=12))
def test_cuts_change_nothing(shape, text, places):
    whole = parse(shape, [text])
    assert parse(shape, cut(text, places)) == whole
    assert parse(shape, text) == whole


@given(st.sampled_from(SHAPES), TEXTS, TEXTS)
def test_text_that_is_known_is_not_given_again(shape, begun, text):
    whole = parse(shape, [begun + text])
    texts = "".join(part.text for part in whole if not isinstance(part, CallStart))
    parser = AnswerParser(shape, DIALECTS["hermes"].call_ids("seed"), begun)
    rest = [part for part in [*parser.push(text), *parser.finish()] if not isinstance(part, CallStart)]
    assert texts.endswith("".join(part.text for part in rest))
    assert len("".join(part.text for part in rest)) <= len(text)


def test_an_answer_goes_on():
    def goes_on(begun, text):
        parser = AnswerParser(shape_of("hermes", reasoning="may begin"), str, begun)
        return [*parser.push(text), *parser.finish()]

    assert goes_on("Hello, ", "world") == [Content("world")]
    assert goes_on("1 <", "2") == [Content("2")]
    assert goes_on("<think>So", " be it.</think>\nHi") == [Reasoning(" be it."), Content("Hi")]
    assert goes_on("See\n<tool_c", "all>no") == [Content("all>no")]
    assert goes_on("See\n<tool_c", WRITTEN["hermes"][1][0][7:]) == [
        CallStart(0, "0", "get_weather"),
        Arguments(0, PARIS),
    ]


@given(TEXTS)
def test_content_without_calls_is_the_text_itself(text):
    for shape in (AnswerShape(), shape_of("hermes", NONE)):
        assert parse(shape, text) == ([Content(text)] if text else [])


def test_a_call_begins_with_its_id_and_name_and_then_has_arguments():
    [start, arguments] = parse(shape_of("hermes"), ['<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'])
    assert start == CallStart(0, DIALECTS["hermes"].call_ids("seed")(0), "get")
    assert arguments == Arguments(0, "{}")


def test_arguments_arrive_as_they_are_written():
    parser = AnswerParser(shape_of("llama3"), str)
    assert parser.push('{"name": "get_weather", "parameters": ') == []
    assert parser.push('{"ci') == [CallStart(0, "0", "get_weather"), Arguments(0, '{"ci')]
    assert parser.push('ty":  "a}') == [Arguments(0, 'ty":  "a}')]
    assert parser.push('"}}') == [Arguments(0, '"}')]
    assert parser.push("; ") == []
    assert parser.finish() == []


def test_text_that_may_begin_a_marker_waits():
    parser = AnswerParser(shape_of("mistral"), str)
    assert parser.push("See [") == [Content("See")]
    assert parser.push("TOOL") == []
    assert parser.push("S]") == [Content(" [TOOLS]")]
    assert parser.push(" [TOOL_CALLS") == []
    assert parser.finish() == [Content(" [TOOL_CALLS")]


def test_space_belongs_to_text_only_where_text_follows():
    hermes = shape_of("hermes", reasoning="may begin")
    call = WRITTEN["hermes"][0][0]
    assert answer(hermes, "<think>\n\n</think>\n\nHi \n").content == "Hi \n"
    assert answer(hermes, "Hi \n").content == "Hi \n"
    assert answer(hermes, "Hi \n" + call).content == "Hi"
    assert answer(hermes, "<think>a</think>\n\n" + call + "\n").content == ""
    assert answer(hermes, " \n").content == " \n"
    assert parse(hermes, ["<think>\n\n</think>\n\n"]) == []


def test_reasoning_alone_needs_no_tools():
    may, begun = AnswerShape(reasoning="may begin"), AnswerShape(reasoning="begun")
    assert parse(may, ["\n<think>\na < b </thin\n</think>\n\nSo <think>?"]) == [
        Reasoning("a < b </thin"),
        Content("So <think>?"),
    ]
    assert parse(begun, ["a\n</think>\n\nb</think>"]) == [Reasoning("a"), Content("b</think>")]
    assert parse(may, ["</think> is a tag"]) == [Content("</think> is a tag")]
    assert parse(begun, ["Cut </thi"]) == [Reasoning("Cut </thi")]
    assert parse(may, ["<thi"]) == [Content("<thi")]


CUT = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
    "llama3": '{"name": "get_weather", "parameters": {"city": "Paris"}}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]',
    "json": '{"name": "get_weather", "arguments": {"city": "Paris"}}',
}


@pytest.mark.parametrize("dialect", CUT)
def test_a_text_cut_amid_a_call_keeps_what_it_has(dialect):
    text = CUT[dialect]
    opened = text.index(PARIS)
    marker = DIALECTS[dialect].marker or ""
    for length in range(1, len(text) + 1):
        found = answer(shape_of(dialect), text[:length])
        if length > opened:
            assert found.calls == [("get_weather", text[opened:length][: len(PARIS)])]
            assert found.content == ""
        else:
            assert found.calls == []
            # A marker that is not whole may be text; a call's beginning is none.
            assert found.content == (text[:length] if length < len(marker) and text.startswith(marker) else "")


BROKEN = [
    ("hermes", "<tool_call>hello</tool_call>"),
    ("hermes", '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>'),
    ("hermes", 'a\n<tool_call>\n{"name": "get", "arguments": "{}"}'),
    ("hermes", '<tool_call>\n{"arguments": {}, "name": "get"}\n</tool_call>'),
    ("llama3", '{"a": 1}'),
    ("llama3", '{"name": "get"}'),
    ("llama3", '<|python_tag|>search.call(query="a")'),
    ("llama3", 'So: {"name": "get", "parameters": {}}'),
    ("mistral", '[TOOL_CALLS]{"name": "get", "arguments": {}}'),
    ("mistral", "[TOOL_CALLS]get{}"),
    ("json", "null"),
]


@pytest.mark.parametrize(("dialect", "text"), BROKEN)
def test_what_is_no_call_is_content(dialect, text):
    assert parse(shape_of(dialect), text) == [Content(text)]


def test_text_after_calls_is_content():
    call = WRITTEN["hermes"][0][0]
    found = answer(shape_of("hermes"), f"a {call}\n b \n{call} c")
    assert (found.content, len(found.calls)) == ("abc", 2)
    found = answer(shape_of("hermes", parallel=False), f"{call}\n{call}")
    assert (found.content, len(found.calls)) == (call, 1)
    found = answer(shape_of("mistral"), '[TOOL_CALLS][{"name": "get", "arguments": {}}, {"name": "nobody"}]')
    assert (found.content, found.calls) == (', {"name": "nobody"}]', [("get", "{}")])
    found = answer(shape_of("llama3"), '{"name": "get", "parameters": {}, "x": 1}')
    assert (found.content, found.calls) == (', "x": 1}', [("get", "{}")])


def test_ids_are_those_of_the_seed():
    for name, dialect in DIALECTS.items():
        ids = dialect.call_ids("request-7/0")
        assert [ids(i) for i in range(3)] == [dialect.call_ids("request-7/0")(i) for i in range(3)]
        assert len({ids(0), ids(1), dialect.call_ids("request-7/1")(0)}) == 3
        assert ids(0).isalnum() and len(ids(0)) == 9 if name == "mistral" else len(ids(0)) == len("call_") + 24
    assert answer(shape_of("hermes"), SEVERAL["hermes"][0]).ids == [
        DIALECTS["hermes"].call_ids("seed")(i) for i in (0, 1)
    ]


def test_a_named_tool_without_a_format_has_its_arguments_alone():
    shape = shape_of("json", NAMED)
    assert answer(shape, "\n" + PARIS + "\n").calls == [("get_weather", PARIS)]
    assert shape.alone and not shape_of("json", REQUIRED).alone and not shape_of("hermes", NAMED).alone


def test_the_markers_of_an_answer():
    assert shape_of("hermes", NONE).markers == ()
    assert shape_of("hermes", reasoning="begun").markers == ("<think>", "</think>", "<tool_call>", "</tool_call>")
    assert shape_of("mistral").markers == ("[TOOL_CALLS]",)
    assert shape_of("json").markers == ()
    assert [tool.name for tool in shape_of("hermes", NAMED).allowed] == ["get_weather"]
    assert shape_of("hermes").allowed == TOOLS


@pytest.mark.parametrize("name", ["phi-2", "phi-3-mini"])
def test_tokens_of_a_real_tokenizer_change_nothing(data_dir, name):
    folder = data_dir / "tokenizers/ort_ext" / name
    tokenizer = Tokenizer.from_folder(folder)
    for dialect, texts in RECORDED.items():
        for text in [*texts, "Let me see: " + texts[0], "日本語 🎈 <tool_"]:
            shape = shape_of(dialect, reasoning="may begin")
            ids = tokenizer.encode(text, add_special_tokens=False)
            reader = tokenizer.detokenizer()
            pieces = [reader.push([token]) for token in ids]
            pieces.append(reader.flush())
            assert "".join(pieces).lstrip(" ") == text.lstrip(" ")
            assert parse(shape, pieces) == parse(shape, ["".join(pieces)])
