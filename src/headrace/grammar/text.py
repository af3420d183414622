"""Constraints as the text that `llguidance.LLMatcher(tokenizer, text)` compiles, and its errors in plain words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from headrace.engine.schedule.constraint import Constraint, is_text
from headrace.errors import RequestError
from headrace.grammar.lark import checked_lark, lark_string
from headrace.grammar.patterns import rust_fault
from headrace.grammar.schema import checked_schema

__all__ = ["as_lark", "bad_words_text", "compile_error", "embedded_schema", "grammar_text", "refuse_empty"]

ESCAPES = 'nrbtf\\"'
r"""What may follow a backslash in a JSON string. Without u, as a name could be written again as \u0061."""
SPACE = re.compile(
    r"(?:[ \t\n\r]|\\[ntr]|\\x20|\\x0[9aAdD])"  # one character of space, or a set of them
    r"|\[(?:[ \t\n\r]|\\[ntr]|\\x20|\\x0[9aAdD])+\]|\(\?:|[()|*+?]|\{\d{1,4}(?:,\d{0,4})?\}"
)
PLACE = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
"""Of a message: line and column."""
START = re.compile(r"^[ \t]*\??start\b[^\n]*?:(?!:=)", re.MULTILINE)
GBNF = re.compile(r"^[ \t]*root[ \t]*::=", re.MULTILINE)
REASONS = (
    ("look-around, including", "no automaton can match lookahead or lookbehind: leave them out"),
    ("lookarounds not supported", r"^ and $ may only stand at the ends of a pattern, and \b and \B nowhere"),
    ("backreferences are not", "no automaton can match a backreference: leave it out"),
    ("Unsatisfiable schema", "no JSON fits the schema"),
    ("circular references with sibling", "a $ref that leads back to itself may have no other keywords beside it"),
    ("patternProperty regexes", "no name may match two patterns of patternProperties, and that must be decidable"),
    ("min/maxProperties only", "minProperties and maxProperties need every name of properties to be in required"),
    ("Unable to determine if regex is empty", "a pattern together with the other rules of its string is too complex"),
    ("recursion limit exceeded", "the schema is nested too deep once its conditions are written out"),
    ("schema too large", "the schema is too large"),
    ("stack level exceeded", "the schema combines too many schemas with each other"),
    ("too complex", "it is too complex for one grammar"),
    ("fuel", "it is too complex for one grammar"),
    ("grammar too large", "it is too large for one grammar"),
    ("too many symbols", "it is too large for one grammar"),
)
"""A part of a message of llguidance, and what it means."""


def grammar_text(constraint: Constraint) -> str:
    """The text to compile. Raises `RequestError` about {constraint} where it cannot be honoured as it is written."""
    return _KINDS[constraint.kind](constraint)


def embedded_schema(schema_text: str, whitespace: str | None = None, strict: bool = False) -> str:
    """A JSON schema for `%json` in a Lark grammar, with its options inside. Raises `RequestError` like a constraint."""
    schema = checked_schema(schema_text, strict)
    if schema is False:
        raise RequestError.about("constraint", "{constraint}: the schema is false, which no JSON fits")
    options = _options(whitespace)
    return json.dumps({**(schema if isinstance(schema, dict) else {}), "x-guidance": options}, ensure_ascii=False)


def bad_words_text(words: Sequence[str]) -> str:
    """A grammar of any text, also empty, that contains none of `words`. Raises `RequestError` about {bad_words}."""
    for word in words:
        if not word or not is_text(word):
            raise RequestError.about("bad_words", "{bad_words}: {} is no text to look for: leave it out", repr(word))
    if not words:
        return "start: /(?s:.*)/"
    listed = " | ".join(lark_string(word) for word in dict.fromkeys(words))
    # A complement has bytes that are no UTF-8, so it is cut down to text.
    return f"start: TEXT\nANY: /(?s:.*)/\nTEXT: ANY & ~(ANY ({listed}) ANY)"


def compile_error(message: str) -> RequestError:
    """The error about {constraint} that llguidance's message means."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = next((line.removeprefix("error:").strip() for line in lines if line.startswith("error:")), "")
    place = PLACE.match(message)
    where = f"line {place[1]}, column {place[2]}: " if place else ""
    for part, meaning in REASONS:
        if part in message:
            detail = "" if said or part not in (lines or [""])[0] else f" ({lines[0][:200]})"
            return RequestError.about("constraint", "{constraint} cannot be honoured: {}{}{}", where, meaning, detail)
    first = PLACE.sub("", (lines or ["no reason given"])[0])
    return RequestError.about("constraint", "{constraint} cannot be compiled: {}{}", where, (said or first)[:300])


def refuse_empty(matcher: LLMatcher) -> None:
    """Raise where no text at all fits a compiled grammar. `matcher` is at its beginning, and stays there.

    Such a grammar compiles; the first mask finds that nothing can follow, and ends in an error.
    """
    trial = matcher.deep_copy()
    trial.compute_bitmask()
    if not trial.is_error():
        return
    if "NoExtension" in trial.get_error():
        raise RequestError.about("constraint", "{constraint}: no text fits it")
    raise compile_error(trial.get_error())


def _schema_text(constraint: Constraint) -> str:
    return _json_grammar(embedded_schema(constraint.text, constraint.whitespace, constraint.strict))


def _object_text(constraint: Constraint) -> str:
    return _json_grammar(embedded_schema('{"type": "object"}', constraint.whitespace))


def _regex_text(constraint: Constraint) -> str:
    if not is_text(constraint.text):
        raise RequestError.about("constraint", "{constraint}: half of a surrogate pair is no text")
    if fault := rust_fault(constraint.text):
        raise RequestError.about(
            "constraint", "{constraint}: the regular expression has {}, which no automaton can match", fault
        )
    return LLMatcher.grammar_from_regex(constraint.text)


def _choice_text(constraint: Constraint) -> str:
    choices = json.loads(constraint.text)
    # One lexeme, so that a choice which begins another is no end of it.
    return f"start: CHOICE\nCHOICE: {' | '.join(map(lark_string, choices))}"


def _lark_text(constraint: Constraint) -> str:
    """Of Lark, or of GBNF, the form of EBNF that llama.cpp and vLLM read: `root ::= …`."""

    def embed(text: str) -> str:
        return embedded_schema(text, constraint.whitespace, constraint.strict)

    return LLMatcher.grammar_from_lark(checked_lark(as_lark(constraint.text), embed))


def as_lark(grammar: str) -> str:
    """A grammar in Lark's form, also one that was written in GBNF. Raises `RequestError` about {constraint}."""
    if START.search(grammar) or not GBNF.search(grammar):
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # the converter raises bare ones, too
        raise RequestError.about("constraint", "{constraint}: the grammar is no GBNF: {}", str(error)[:300]) from None


_KINDS = {
    "json_schema": _schema_text,
    "json": _object_text,
    "regex": _regex_text,
    "choice": _choice_text,
    "lark": _lark_text,
}


def _json_grammar(schema: str) -> str:
    return f'{{"grammars": [{{"json_schema": {schema}}}]}}'


def _options(whitespace: str | None) -> dict[str, Any]:
    """llguidance's options of JSON. Raises `RequestError` for space that is not JSON's."""
    options: dict[str, Any] = {"json_allowed_escapes": ESCAPES, "whitespace_flexible": False}
    if whitespace is None:
        return {"item_separator": ", ", "key_separator": ": ", **options}
    options |= {"item_separator": ",", "key_separator": ":"}
    if not whitespace:
        return options
    position = 0
    while position < len(whitespace):
        token = SPACE.match(whitespace, position)
        if not token:
            raise RequestError.about(
                "constraint",
                "{constraint}: whitespace={} has {} at {}: JSON has only space, \\n, \\r and \\t between its parts",
                repr(whitespace),
                repr(whitespace[position]),
                position,
            )
        position = token.end()
    try:
        re.compile(whitespace)
    except (re.error, OverflowError, RecursionError) as error:
        raise RequestError.about("constraint", "{constraint}: whitespace={}: {}", repr(whitespace), error) from None
    return {**options, "whitespace_pattern": whitespace}
