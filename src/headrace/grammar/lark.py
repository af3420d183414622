"""Grammars in llguidance's dialect of Lark: what a user may write, and text as its strings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from headrace.engine.schedule.constraint import is_text
from headrace.errors import RequestError

__all__ = ["checked_lark", "lark_string"]

PARTS = re.compile(
    r'(?:\#|//)[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?P<json>%json\b)'
    r"|(?<![\w-])(?P<option>stop|max_tokens|temperature)[ \t]*="
)
"""Comments, strings and regular expressions, in which nothing is looked for; and what is looked for."""
SPACE = re.compile(r"\s*")
OPTIONS = {
    "stop": "takes tokens back, which is not done here: write suffix or lazy",
    "max_tokens": "counts tokens, which is not done here: write a count in the regular expression, as /.{0,100}/",
    "temperature": "would change the request's temperature: set that instead",
}


def lark_string(text: str) -> str:
    """A text as a string of a grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def checked_lark(grammar: str, embed: Callable[[str], str]) -> str:
    """The grammar with `embed` of each JSON schema in it. Raises `RequestError` for an option that is not honoured."""
    if not is_text(grammar):
        raise RequestError.about("constraint", "{constraint}: half of a surrogate pair is no text")
    if not grammar.strip():
        raise RequestError.about("constraint", "{constraint}: the grammar is empty: it needs a rule named start")
    out, position = list[str](), 0
    while found := PARTS.search(grammar, position):
        if option := found["option"]:
            line = grammar.count("\n", 0, found.start()) + 1
            raise RequestError.about(
                "constraint", "{constraint}: line {}: the option {} {}", line, option, OPTIONS[option]
            )
        out.append(grammar[position : found.end()])
        position = found.end()
        if found["json"]:
            start = SPACE.match(grammar, position).end()  # type: ignore[union-attr]
            end = _json_end(grammar, start)
            out.append(" " + embed(grammar[start:end]))
            position = end
    return "".join(out) + grammar[position:]


def _json_end(grammar: str, start: int) -> int:
    """Where a JSON object that starts here ends."""
    try:
        return json.JSONDecoder().raw_decode(grammar, start)[1]
    except (ValueError, RecursionError) as error:
        line = grammar.count("\n", 0, start) + 1
        raise RequestError.about("constraint", "{constraint}: line {}: %json needs a schema: {}", line, error) from None
