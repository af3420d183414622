"""The fields that constrain a text: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.engine.schedule.constraint import Constraint
from headrace.errors import renamed_fields
from headrace.grammar.text import as_lark
from headrace.serve.errors import RefusedError
from headrace.serve.protocol.bodies import Body

__all__ = ["constraint_field", "read_constraint"]

ANY_SPACE = r"[ \n\r\t]*"
FORMATS = ("text", "json_object", "json_schema")
KINDS = ("json", "json_object", "regex", "choice", "grammar")
OPTIONS = ("whitespace_pattern", "disable_any_whitespace")
NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "disable_fallback": (True, False),
    "disable_additional_properties": (False,),
    "structural_tag": (),
}
"""Options of vLLM's with the values that ask for nothing."""


def constraint_field(body: Body) -> str:
    """The name of the field that constrains this request's text."""
    return "structured_outputs" if body.get("structured_outputs") else "response_format"


def read_constraint(body: Body) -> Constraint | None:
    """The constraint of a request; None without one. Raises an error with the field at fault."""
    format_, outputs = body.get("response_format", {}), body.get("structured_outputs", {})
    chosen = format_.get("type", "text") != "text"
    if chosen and outputs:
        raise RefusedError(
            "response_format and structured_outputs both constrain the text: send one of them", "structured_outputs"
        )
    with renamed_fields({"constraint": constraint_field(body)}):
        return _of_outputs(outputs) if outputs else _of_format(format_)


def _of_format(sent: Mapping[str, Any]) -> Constraint | None:
    field = "response_format"
    sent = _given(sent)
    if not sent:
        return None
    kind = sent.get("type")
    _need(kind in FORMATS, f"{field}.type={kind!r} is not one of {', '.join(FORMATS)}", field)
    _only(sent, ("type", "json_schema") if kind == "json_schema" else ("type",), field)
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint.json()
    inner = sent.get("json_schema")
    _need(isinstance(inner, Mapping), f"{field}.json_schema must be an object with a name and a schema", field)
    assert isinstance(inner, Mapping)
    inner = _given(inner)
    _only(inner, ("name", "description", "schema", "strict"), f"{field}.json_schema")
    schema, strict = inner.get("schema"), inner.get("strict") or False
    _need(isinstance(schema, Mapping), f"{field}.json_schema.schema must be a JSON schema, an object", field)
    _need(isinstance(strict, bool), f"{field}.json_schema.strict must be true or false", field)
    assert isinstance(schema, Mapping)
    return Constraint.json_schema(schema, strict=strict)


def _of_outputs(sent: Mapping[str, Any]) -> Constraint | None:
    field = "structured_outputs"
    given = _given(sent)
    for name in [name for name in given if name in NO_EFFECT]:
        value = given.pop(name)
        ok = any(value is neutral for neutral in NO_EFFECT[name])
        _need(ok, f"{field}.{name} cannot be honoured: leave it out", field)
    _only(given, (*KINDS, *OPTIONS), field)
    if given.get("json_object") is False:
        del given["json_object"]
    kinds = [name for name in KINDS if name in given]
    _need(len(kinds) == 1, f"{field} must have one of {', '.join(KINDS)}, not {' and '.join(kinds) or 'none'}", field)
    [kind] = kinds
    space = _space(given, field)
    if kind not in ("json", "json_object"):
        _need("whitespace_pattern" not in given, f"{field}.whitespace_pattern is an option of JSON alone", field)
    makers: Mapping[str, Callable[[Any], Constraint]] = {
        "json": lambda schema: Constraint.json_schema(schema, space),
        "json_object": lambda _: Constraint.json(space),
        "regex": Constraint.regex,
        "choice": Constraint.choice,
        "grammar": lambda text: Constraint.lark(as_lark(text)),
    }
    kind_of = {"json": (str, Mapping, bool), "json_object": bool, "regex": str, "choice": list, "grammar": str}[kind]
    _need(isinstance(given[kind], kind_of), f"{field}.{kind} has a value of the wrong type", field)  # type: ignore[arg-type]
    return makers[kind](given[kind])


def _space(given: Mapping[str, Any], field: str) -> str | None:
    pattern, fixed = given.get("whitespace_pattern"), given.get("disable_any_whitespace", True)
    _need(isinstance(pattern, str | None), f"{field}.whitespace_pattern must be a regular expression", field)
    _need(isinstance(fixed, bool), f"{field}.disable_any_whitespace must be true or false", field)
    return pattern if pattern is not None else None if fixed else ANY_SPACE


def _given(sent: Mapping[str, Any]) -> dict[str, Any]:
    """Clients that write out all their options send nulls."""
    return {name: value for name, value in sent.items() if value is not None}


def _only(sent: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in sent:
        message = f"{where} has no key {str(name)[:60]!r}: it may have {', '.join(names)}"
        _need(name in names, message, where.partition(".")[0])


def _need(ok: bool, message: str, field: str) -> None:
    if not ok:
        raise RefusedError(message, field)
