"""`Reader`: the bytes of a request to its fields, or an error that names what is wrong with them."""

from __future__ import annotations

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
"""The fields that were sent, without nulls and without those that are ignored."""
MAX_SHOWN = 60


class Reader:
    """Reads the bodies of one endpoint by its rows of the table."""

    def __init__(self, endpoint: str, name: str) -> None:
        """`name` is the request's in the OpenAPI document."""
        self._fields = fields_of(endpoint)
        self.model = _model(name, self._fields)

    def read(self, data: bytes) -> Body:
        """The fields. Raises `RefusedError` with the field at fault, or None where it is not JSON."""
        sent = _json(data)
        given = {name: value for name, value in sent.items() if value is not None}
        for name, value in given.items():
            field = self._fields.get(name)
            if field is None:
                raise RefusedError(f"{_short(name)} is not a field of this request{self._guess(name)}", _short(name))
            if field.fate == "refused" and not _asks_nothing(value, field):
                raise RefusedError(f"{name} cannot be honoured: {field.says}", name)
        for name, field in self._fields.items():
            if field.required and name not in given:
                raise RefusedError(f"{name} is missing: {field.says}", name)
        try:
            self.model.model_validate(given)
        except ValidationError as error:
            raise _refusal(error) from None
        return {name: value for name, value in given.items() if self._fields[name].fate == "honoured"}

    def schema(self) -> dict[str, Any]:
        """The request body for the OpenAPI document."""
        schema = self.model.model_json_schema(ref_template="#/components/schemas/{model}")
        return {"content": {"application/json": {"schema": schema}}, "required": True}

    def _guess(self, name: str) -> str:
        near = difflib.get_close_matches(name[:MAX_SHOWN], [n for n, f in self._fields.items() if f.fate == "honoured"])
        return f": did you mean {near[0]}?" if near else ""


def _model(name: str, fields: Mapping[str, Field]) -> type[BaseModel]:
    """Strict: a number is not a string, and a boolean not a number."""
    shape: dict[str, Any] = {
        field.name: (
            (field.kind, Constraint(description=field.says))
            if field.required
            else (field.kind | None if field.kind is not Any else Any, Constraint(None, description=_told(field)))
        )
        for field in fields.values()
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True, protected_namespaces=()), **shape)


def _told(field: Field) -> str:
    return field.says if field.fate == "honoured" else f"{field.fate}: {field.says}"


def _json(data: bytes) -> dict[str, Any]:
    try:
        sent = msgspec.json.decode(data)
    except RecursionError:
        raise RefusedError("the body's JSON is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(f"the body is not JSON: {error}") from None
    if not isinstance(sent, dict):
        raise RefusedError("the body must be a JSON object")
    return sent


def _asks_nothing(value: Any, field: Field) -> bool:
    return any(type(value) is type(nothing) and value == nothing for nothing in field.nothing)


def _refusal(error: ValidationError) -> RefusedError:
    """What is wrong, where it is: of the kinds that a field may have, the one that got furthest."""
    errors = error.errors(include_url=False, include_context=False)
    deepest = max(errors, key=lambda e: len(_indices(e["loc"])))
    indices, name = _indices(deepest["loc"]), str(deepest["loc"][0])
    same = [e for e in errors if e["loc"][0] == name and _indices(e["loc"]) == indices]
    said = " or ".join(dict.fromkeys(e["msg"][:1].lower() + e["msg"][1:].removesuffix(" instance") for e in same))
    value = deepest["input"]
    shown = _short(repr(value)) if isinstance(value, (str, int, float, bool)) else f"a {type(value).__name__}"
    return RefusedError(f"{_short(name)}{''.join(f'[{i}]' for i in indices)}: {said} (got {shown})", name)


def _indices(loc: tuple[int | str, ...]) -> list[int]:
    return [part for part in loc if isinstance(part, int)]


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
