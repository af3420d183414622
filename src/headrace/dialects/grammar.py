"""The grammar of an answer, in the Lark dialect of llguidance.

Reasoning, text and calls are one grammar, so what the answer may be next depends on its tokens alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from headrace.dialects.base import THINK, UNTHINK, AnswerShape, Dialect
from headrace.engine.schedule.constraint import Constraint
from headrace.errors import renamed_fields

__all__ = ["answer_constraint"]

# Of the words in capitals, the lexer takes the longest match, but a lazy rule ends at its first.
TERMINALS = r"""
TEXT: /(.|\n)*/
PROSE: /[ \n\r\t]*([^ \n\r\t{](.|\n)*)?/
WS: /[ \n\r\t]{1,4}/
"""
ANY_OBJECT = '{"type": "object"}'
SPACED = {":": ": ", ",": ", "}
"""The pieces of JSON that `Constraint` writes with a space."""


def answer_constraint(shape: AnswerShape, special: Callable[[str], int | None]) -> Constraint | None:
    """What constrains an answer; None where nothing does.

    `special` gives the id of a text that is one special token of the tokenizer, and None for any other text. Raises
    `RequestError` about {tools} where their schemas are too long together.
    """
    if not shape.allowed and (shape.content is None or shape.reasoning is None):
        return shape.content
    rules = ["start: answer" if shape.reasoning is None else "start: reasoned"]
    if shape.reasoning is not None:
        rules += _reasoning(shape, special)
    rules += _answer(shape, special)
    if shape.content is not None:
        rules += _content(shape.content)
    if shape.allowed and shape.dialect is not None:
        rules += _calls(shape, shape.dialect, special)
    text = "\n".join(rules) + TERMINALS
    with renamed_fields({"constraint": "tools"} if shape.allowed else {}):
        if shape.content is None:
            return Constraint.lark(text)
        # Its options hold for every schema of a grammar, but strictness is not what the tools asked for.
        return replace(shape.content, kind="lark", text=text, strict=shape.content.strict and not shape.allowed)


def _reasoning(shape: AnswerShape, special: Callable[[str], int | None]) -> Iterator[str]:
    """Reasoning ends at the first `</think>`, whatever else stands in it."""
    # White space before other text is a part of it.
    after = "answer" if shape.content is None else "WS? answer"
    yield "reasoned: " + (f"reasoning {after}" if shape.reasoning == "begun" else f"answer | think reasoning {after}")
    yield from _lazy("reasoning", "TEXT", UNTHINK, special)
    if shape.reasoning == "may begin":
        yield from _lazy("think", "WS?", THINK, special)


def _answer(shape: AnswerShape, special: Callable[[str], int | None]) -> Iterator[str]:
    dialect = shape.dialect
    if not shape.allowed or dialect is None:
        yield "answer: content"
        return
    text = "PROSE" if dialect.bare else "TEXT"
    forms = []
    if shape.choice.mode == "auto":
        forms.append(text if shape.content is None else "content")
    if dialect.marker is not None:
        before = text if forms == [text] else "WS?"
        yield from _lazy("marked", before, dialect.marker, special)
        forms.append(f"marked {_gapped(dialect.opening[1:], special)} WS? calls")
    if dialect.bare:
        forms.append("WS? calls")
    yield "answer: " + " | ".join(forms)


def _calls(shape: AnswerShape, dialect: Dialect, special: Callable[[str], int | None]) -> Iterator[str]:
    more = "" if shape.once else f"({_gapped(dialect.between or (), special)} WS? call)*"
    yield f"calls: call {more} {_gapped(dialect.closing, special)} WS?"
    tools = shape.allowed
    yield "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))
    for i, tool in enumerate(tools):
        yield f"arguments_{i}: %json {tool.schema}"
        # Lexeme by lexeme, as in JSON beside it: of a longer one, the lexer could not go back to a brace.
        head = " ".join(json.dumps(SPACED.get(piece, piece)) for piece in dialect.head(tool.name))
        yield f"call_{i}: arguments_{i}" if shape.alone else f'call_{i}: {head} arguments_{i} "}}"'


def _content(content: Constraint) -> Iterator[str]:
    if content.kind in ("json_schema", "json"):
        yield f"content: %json {content.text if content.kind == 'json_schema' else ANY_OBJECT}"
    elif content.kind == "choice":
        yield "content: CHOICE"
        yield "CHOICE: " + " | ".join(map(_string, json.loads(content.text)))
    elif content.kind == "regex":
        yield "content: " + (f"/{_in_slashes(content.text)}/" if content.text else '""')
    else:
        yield f"content: %lark {{\n{content.text}\n}}"


def _lazy(rule: str, before: str, marker: str, special: Callable[[str], int | None]) -> Iterator[str]:
    """A rule for the shortest text that ends in a marker: as a special token, or spelled by others."""
    spelled = f"{before} {json.dumps(marker)}"
    token = special(marker)
    if token is None:
        yield f"{rule}[lazy]: {spelled}"
    else:
        yield f"{rule}: {rule}_spelled | {before} <[{token}]>"
        yield f"{rule}_spelled[lazy]: {spelled}"


def _gapped(pieces: Sequence[str], special: Callable[[str], int | None]) -> str:
    """Pieces with white space before each, or none."""
    texts = [(json.dumps(piece), special(piece) if len(piece) > 1 else None) for piece in pieces]
    return " ".join(f"WS? {text}" if token is None else f"WS? ({text} | <[{token}]>)" for text, token in texts)


def _string(text: str) -> str:
    """A text as a string of the grammar, which takes no character of control."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _in_slashes(pattern: str) -> str:
    """A regular expression as it stands between slashes."""
    escapes = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    return re.sub(r"\\.|/|\n", lambda found: escapes.get(found[0], found[0]), pattern, flags=re.DOTALL)
