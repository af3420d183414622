"""`Reader`: parses and checks a request's body, with errors that name the field."""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic import Field as Constraint

from headrace.serve.errors import RefusedError
from headrace.serve.protocol.fields import Field, fields_of

__all__ = ["Body", "Reader"]

Body = Mapping[str, Any]
"""The fields that were sent, without nulls and ignored fields."""
MAX_SHOWN = 60
UNKNOWN, UNSUPPORTED, MISSING = "unknown_parameter", "unsupported_parameter", "missing_required_parameter"
"""OpenAI's codes of these errors."""


class Reader:
    """Reads the bodies of one endpoint by its rows of the table."""

    def __init__(self, endpoint: str, name: str) -> None:
        """`name` is the schema's title in the OpenAPI document."""
        self._fields = fields_of(endpoint)
        self.model = _model(name, self._fields)

    def read(self, data: bytes) -> Body:
        """The fields. Raises `RefusedError`, whose `param` is the field at fault (None if the body is not JSON)."""
        sent = _json(data)
        given = {name: value for name, value in sent.items() if value is not None}
        for name, value in given.items():
            field = self._fields.get(name)
            if field is None:
                raise RefusedError(
                    f"{_short(name)} is not a field of this request{self._guess(name)}", _short(name), UNKNOWN
                )
            if field.handling == "refused" and not _is_neutral(value, field, given):
                raise RefusedError(f"{name} cannot be honoured: {field.description}", name, UNSUPPORTED)
        for name, field in self._fields.items():
            if field.required and name not in given:
                raise RefusedError(f"{name} is missing: {field.description}", name, MISSING)
        try:
            self.model.model_validate(given)
        except ValidationError as error:
            raise _refusal(error) from None
        return {name: value for name, value in given.items() if self._fields[name].handling == "honoured"}

    def schema(self) -> dict[str, Any]:
        """The request body for the OpenAPI document."""
        schema = self.model.model_json_schema(ref_template="#/components/schemas/{model}")
        return {"content": {"application/json": {"schema": schema}}, "required": True}

    def _guess(self, name: str) -> str:
        near = difflib.get_close_matches(
            name[:MAX_SHOWN], [n for n, f in self._fields.items() if f.handling == "honoured"]
        )
        return f": did you mean {near[0]}?" if near else ""


def _model(name: str, fields: Mapping[str, Field]) -> type[BaseModel]:
    """Strict: a number is not a string, and a boolean not a number."""
    shape: dict[str, Any] = {
        field.name: (
            (field.kind, Constraint(description=field.description))
            if field.required
            else (
                field.kind | None if field.kind is not Any else Any,
                Constraint(None, description=_description(field)),
            )
        )
        for field in fields.values()
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True, protected_namespaces=()), **shape)


def _description(field: Field) -> str:
    return field.description if field.handling == "honoured" else f"{field.handling}: {field.description}"


def _json(data: bytes) -> dict[str, Any]:
    try:
        sent = msgspec.json.decode(data.removeprefix(codecs.BOM_UTF8))
    except RecursionError:
        raise RefusedError("the body's JSON is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(f"the body is not JSON: {error}") from None
    if not isinstance(sent, dict):
        raise RefusedError("the body must be a JSON object")
    return sent


def _is_neutral(value: Any, field: Field, given: Body) -> bool:
    """Whether a refused field's value asks for nothing."""
    same = () if field.same_as is None else (given.get(field.same_as),)
    return any(type(value) is type(neutral) and value == neutral for neutral in (*field.neutral, *same))


def _refusal(error: ValidationError) -> RefusedError:
    """The error at the deepest index: of a field's accepted types, the one that matched furthest."""
    errors = error.errors(include_url=False, include_context=False)
    deepest = max(errors, key=lambda e: len(_indices(e["loc"])))
    indices, name = _indices(deepest["loc"]), str(deepest["loc"][0])
    same = [e for e in errors if e["loc"][0] == name and _indices(e["loc"]) == indices]
    messages = " or ".join(dict.fromkeys(e["msg"][:1].lower() + e["msg"][1:].removesuffix(" instance") for e in same))
    value = deepest["input"]
    shown = _short(repr(value)) if isinstance(value, (str, int, float, bool)) else f"a {type(value).__name__}"
    return RefusedError(f"{_short(name)}{''.join(f'[{i}]' for i in indices)}: {messages} (got {shown})", name)


def _indices(loc: tuple[int | str, ...]) -> list[int]:
    return [part for part in loc if isinstance(part, int)]


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
