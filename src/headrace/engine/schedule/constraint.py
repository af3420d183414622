"""`Constraint`: a language that a request's output must be in, as plain data. No matcher travels, this does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import RequestError

__all__ = ["KINDS", "Constraint", "is_text"]

KINDS = ("json_schema", "json", "regex", "choice", "lark")
MAX_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the output must be, whole; `SamplingParams.constraint`. Make one by a class method.

    JSON is written with ", " and ": " between its parts and no other space, unless `whitespace` allows more.
    """

    kind: str
    """One of `KINDS`."""
    text: str = ""
    """The schema or the list of choices as JSON, the regular expression, or the Lark grammar."""
    whitespace: str | None = None
    """A regular expression of the space that JSON may have between its parts; "" for its compact form."""
    prefix: str = ""
    """Text that the output goes on with: together they are in the language."""
    strict: bool = False
    """Refuse a schema's keywords and formats that are unknown; otherwise they are annotations, as in the standard."""

    def __post_init__(self) -> None:
        for name, kind in (("kind", str), ("text", str), ("whitespace", str | None), ("prefix", str), ("strict", bool)):
            if not isinstance(getattr(self, name), kind):
                raise RequestError.about("constraint", "{constraint}: {} has a value of the wrong type", name)
        if self.kind not in KINDS:
            raise RequestError.about(
                "constraint", "{constraint}: kind={} is not one of {}", self.kind, ", ".join(KINDS)
            )
        size = len(self.text.encode(errors="surrogatepass"))
        if size > MAX_BYTES:
            raise RequestError.about("constraint", "{constraint} has {} bytes: at most {}", size, MAX_BYTES)
        if self.kind == "choice":
            _check_choices(self.text)

    @classmethod
    def json_schema(
        cls, schema: Mapping[str, Any] | bool | str, whitespace: str | None = None, strict: bool = False
    ) -> Constraint:
        """JSON that is valid under a schema (an object, or its JSON text)."""
        text = schema if isinstance(schema, str) else _dumps(schema)
        return cls("json_schema", text, whitespace, strict=strict)

    @classmethod
    def json(cls, whitespace: str | None = None) -> Constraint:
        """Any JSON object."""
        return cls("json", "", whitespace)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that a regular expression matches from its first to its last character."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """One of these texts."""
        return cls("choice", _dumps(list(choices)))

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """Text of a grammar in the Lark dialect of llguidance, or in GBNF (`root ::= …`)."""
        return cls("lark", grammar)


def _check_choices(text: str) -> None:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and is_text(c) for c in choices):
        raise RequestError.about("constraint", "{constraint}: choices are a list of one or more texts")
    if not all(choices):
        raise RequestError.about("constraint", "{constraint}: a choice is empty: leave it out")
    seen: set[str] = set()
    for choice in choices:
        if choice in seen:
            raise RequestError.about("constraint", "{constraint}: the choice {} stands twice", repr(choice[:100]))
        seen.add(choice)


def is_text(text: str) -> bool:
    """Whether it can be UTF-8: a half of a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError.about("constraint", "{constraint} must be plain JSON: {}", error) from None
