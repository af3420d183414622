"""Tools, a byte-level vocabulary with the formats' markers, and matchers of answers for the tests of dialects."""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from headrace.dialects.base import AnswerShape, Dialect, ReasoningStart, Tool, ToolChoice
from headrace.dialects.choose import DIALECTS
from headrace.dialects.grammar import answer_constraint
from headrace.dialects.parser import AnswerParser, AnswerPart, Arguments, CallStart, Content, Reasoning
from headrace.engine.schedule.constraint import Constraint

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["city"],
    "additionalProperties": False,
}
EMPTY: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["value"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS = {"get_weather": WEATHER, "get": EMPTY, "grow.tree-2": TREE}
TOOLS = tuple(Tool(name, json.dumps(schema)) for name, schema in SCHEMAS.items())

AUTO, REQUIRED, NONE = ToolChoice("auto"), ToolChoice("required"), ToolChoice("none")
NAMED = ToolChoice("required", "get_weather")
MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<think>", "</think>")

Marks = Literal["special", "added", "spelled"]
MARKS: tuple[Marks, ...] = ("special", "added", "spelled")
"""How the vocabulary has the markers: as special tokens, as tokens of plain text, or only as bytes."""

# Tokens that begin or end amid the pieces of a call.
CROSSING = [
    '"}}',
    "}}",
    "{}}",
    "}}\n",
    ">\n",
    ">\n{",
    '{"',
    '": "',
    '", "',
    "</",
    "\n</",
    "<t",
    "; {",
    "]}",
    "}]",
    " [",
    "\n\n",
]


class Vocabulary:
    """What llguidance reads of a tokenizer: every byte, tokens of several characters, special ones."""

    def __init__(self, marks: Marks) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [text.encode() for text in CROSSING]
        if marks == "added":
            self.tokens += [marker.encode() for marker in MARKERS]
        special = ("<eos>", "<other>", *(MARKERS if marks == "special" else ()))
        self.special_token_ids = [len(self.tokens) + i for i in range(len(special))]
        self.tokens += [text.encode() for text in special]
        self.eos_token_id, self.bos_token_id = self.special_token_ids[0], None
        self.special = dict(zip(special, self.special_token_ids, strict=True))

    def __call__(self, data: bytes) -> list[int]:
        return list(data)

    def ids(self, text: str) -> list[int]:
        """Byte by byte, but the markers that are special tokens as those."""
        parts = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)
        return [i for part in parts for i in ([self.special[part]] if part in self.special else part.encode())]


@functools.cache
def vocabulary(marks: Marks) -> tuple[Vocabulary, LLTokenizer]:
    made = Vocabulary(marks)
    return made, LLTokenizer(TokenizerWrapper(made))


def embedded(grammar: str) -> str:
    """The grammar with each schema written as the engine has JSON: one space after a comma and a colon, no other."""
    options = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    out, at = "", 0
    while (found := grammar.find("%json ", at)) >= 0:
        schema, end = json.JSONDecoder().raw_decode(grammar, found + len("%json "))
        out += grammar[at:found] + "%json " + json.dumps({**schema, "x-guidance": options})
        at = end
    return out + grammar[at:]


@functools.lru_cache(4096)
def _compiled(text: str, marks: Marks) -> LLMatcher:
    _, tokenizer = vocabulary(marks)
    found = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(embedded(text)))
    assert not found.is_error(), f"{found.get_error()}\n{text}"
    return found


def matcher(shape: AnswerShape, marks: Marks = "spelled") -> LLMatcher:
    constraint = answer_constraint(shape, vocabulary(marks)[0].special.get)
    assert constraint is not None and constraint.kind == "lark"
    return _compiled(constraint.text, marks).deep_copy()


def taken(shape: AnswerShape, text: str, marks: Marks = "spelled", split: bool = False) -> tuple[int, int, bool]:
    """How many tokens of a text the grammar takes, of how many, and whether the text may end there.

    `split`: also the markers that are special tokens are spelled byte by byte.
    """
    ids = list(text.encode()) if split else vocabulary(marks)[0].ids(text)
    found = matcher(shape, marks)
    count = found.try_consume_tokens(ids)
    return count, len(ids), found.is_accepting()


def accepts(shape: AnswerShape, text: str, marks: Marks = "spelled", split: bool = False) -> bool:
    count, length, whole = taken(shape, text, marks, split)
    return count == length and whole


def parse(shape: AnswerShape, pieces: Iterable[str]) -> list[AnswerPart]:
    """The parts of a text that arrives in pieces, neighbours of one kind joined."""
    dialect = shape.dialect or DIALECTS["hermes"]
    parser = AnswerParser(shape, dialect.call_ids("seed"))
    parts: list[AnswerPart] = []
    for found in [*(parser.push(piece) for piece in pieces), parser.finish()]:
        parts += found
    return joined(parts)


def joined(parts: Sequence[AnswerPart]) -> list[AnswerPart]:
    out: list[AnswerPart] = []
    for part in parts:
        assert isinstance(part, CallStart) or part.text, "an empty part"
        last = out[-1] if out else None
        if isinstance(part, Arguments) and isinstance(last, Arguments) and part.index == last.index:
            out[-1] = Arguments(part.index, last.text + part.text)
        elif isinstance(part, (Content, Reasoning)) and type(part) is type(last):
            out[-1] = type(part)(last.text + part.text)  # type: ignore[union-attr]
        else:
            out.append(part)
    return out


@dataclass
class Answer:
    """An answer as a client sees it."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Names, and arguments as the model wrote them."""
    ids: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> list[Any]:
        return [json.loads(text) for _, text in self.calls]


def answer(shape: AnswerShape, *pieces: str) -> Answer:
    found = Answer()
    for part in parse(shape, pieces):
        if isinstance(part, Content):
            found.content += part.text
        elif isinstance(part, Reasoning):
            found.reasoning += part.text
        elif isinstance(part, CallStart):
            assert part.index == len(found.calls)
            found.calls.append((part.name, ""))
            found.ids.append(part.id)
        else:
            assert part.index == len(found.calls) - 1
            name, text = found.calls[-1]
            found.calls[-1] = (name, text + part.text)
    return found


def shape_of(
    dialect: str | Dialect,
    choice: ToolChoice = AUTO,
    parallel: bool = True,
    reasoning: ReasoningStart | None = None,
    content: Constraint | None = None,
) -> AnswerShape:
    made = DIALECTS[dialect] if isinstance(dialect, str) else dialect
    return AnswerShape(made, TOOLS, choice, parallel, reasoning, content)


PARIS = '{"city": "Paris"}'
WRITTEN: dict[str, list[tuple[str, list[tuple[str, str]]]]] = {
    "hermes": [
        (f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>', [("get_weather", PARIS)]),
        (f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>', [("get_weather", PARIS)]),
        (f'\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n', [("get_weather", PARIS)]),
    ],
    "llama3": [
        (f'{{"name": "get_weather", "parameters": {PARIS}}}', [("get_weather", PARIS)]),
        (f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}', [("get_weather", PARIS)]),
        (f'\n\n{{"name": "get_weather", "parameters": {PARIS}}}\n', [("get_weather", PARIS)]),
    ],
    "mistral": [
        (f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}]', [("get_weather", PARIS)]),
        (f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]', [("get_weather", PARIS)]),
        (f' [TOOL_CALLS]\n[{{"name": "get_weather", "arguments": {PARIS}}}]\n', [("get_weather", PARIS)]),
    ],
    "json": [(f'{{"name": "get_weather", "arguments": {PARIS}}}', [("get_weather", PARIS)])],
}
"""One call of each format, in the ways that models write it."""

BOTH = [("get", "{}"), ("get_weather", '{"city": "Łódź \\"{]\\\\", "days": [1, 2]}')]
SEVERAL: dict[str, list[str]] = {
    "hermes": [
        f'<tool_call>\n{{"name": "get", "arguments": {{}}}}\n</tool_call>{gap}<tool_call>\n'
        f'{{"name": "get_weather", "arguments": {BOTH[1][1]}}}\n</tool_call>'
        for gap in ("\n", "", "\n\n")
    ],
    "llama3": [
        f'{start}{{"name": "get", "parameters": {{}}}};{gap}{{"name": "get_weather", "parameters": {BOTH[1][1]}}}'
        for start in ("", "<|python_tag|>")
        for gap in (" ", "", "\n")
    ],
    "mistral": [
        f'[TOOL_CALLS]{gap}[{{"name": "get", "arguments": {{}}}},{gap}'
        f'{{"name": "get_weather", "arguments": {BOTH[1][1]}}}]'
        for gap in (" ", "")
    ],
}
"""The calls `BOTH` in each format that has several."""
