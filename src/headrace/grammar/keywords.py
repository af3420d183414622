"""The keywords of JSON Schema: what each value must be, which are annotations, and why some cannot be honoured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.errors import RequestError
from headrace.grammar.places import SchemaPlace

__all__ = ["ADVICE", "ANNOTATIONS", "APPLIED", "FORMATS", "TYPES", "VALUES", "fault", "refused"]

TYPES = ("null", "boolean", "number", "string", "array", "object")
"""Of JSON; "integer" is a part of "number"."""

ANNOTATIONS = frozenset(
    {
        "$schema",
        "$id",
        "id",
        "$anchor",
        "$dynamicAnchor",
        "$recursiveAnchor",
        "$comment",
        "$vocabulary",
        "$defs",
        "definitions",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
    }
)
"""Keywords that no value of the instance depends on."""

APPLIED = frozenset(
    {
        "$ref",
        "allOf",
        "anyOf",
        "oneOf",
        "if",
        "not",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "contains",
        "propertyNames",
        "format",
    }
)
"""Keywords that become schemas of their own, for the same value."""

ADVICE = {
    "$dynamicRef": "write a $ref to the schema that it is to mean",
    "$recursiveRef": "write a $ref to the schema that it is to mean",
    "contains": "no grammar can count the items that fit: describe each with prefixItems or items",
    "if": "its opposite cannot be written as a grammar; conditions on required, type, const, enum and bounds can",
    "not": "its opposite cannot be written as a grammar; that of required, type, const, enum and bounds can",
    "oneOf": "a value could fit {} and {}, which no grammar can see: write anyOf, or give each of them a required "
    "property with a const of its own",
    "propertyNames": "names can only have an enum, a const, a pattern, or a least and greatest length",
    "unevaluatedItems": "beside other schemas for the same array, no grammar knows which items they judge: list all "
    "items in one schema, and use items: false",
    "unevaluatedProperties": "beside other schemas for the same object, no grammar knows which properties they judge: "
    "list all properties in one schema, and use additionalProperties: false",
    "uniqueItems": "no grammar remembers the items before: leave it out, or allow at most one item with maxItems",
    "x-guidance": "these options are set by the server: leave it out",
}
"""What to do about a keyword that cannot be honoured."""

YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
DATE = (
    f"(?:{YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{LEAP_YEAR}-02-29)"
)
TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
LABEL = (
    "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,2}[a-zA-Z0-9]"
    "|[a-zA-Z0-9-](?:[a-zA-Z0-9][a-zA-Z0-9-]|-[a-zA-Z0-9])[a-zA-Z0-9-]{0,58}[a-zA-Z0-9])?"
)
"""Of a host's name; without -- in the third and fourth place, where a coded name would have to be decoded."""

FORMATS: dict[str, dict[str, Any]] = {
    "date": {"pattern": f"^{DATE}$"},
    "time": {"pattern": f"^{TIME}$"},
    "date-time": {"pattern": f"^{DATE}[tT]{TIME}$"},
    "duration": {"format": "duration"},
    "email": {"format": "email", "pattern": "^[^@]{1,64}@.{1,189}$"},
    "hostname": {"pattern": rf"^{LABEL}(?:\.{LABEL})*$", "allOf": [{"pattern": "^.{1,253}$"}]},
    "ipv4": {"format": "ipv4"},
    "ipv6": {"format": "ipv6"},
    "uri": {"format": "uri"},
    "uuid": {"format": "uuid"},
}
"""Formats that are honoured, as rules for a string. llguidance's own dates have a 29th of February in every year."""


def fault(where: str, template: str, *values: object) -> RequestError:
    """An error about {constraint} at a place of a schema."""
    return RequestError.about("constraint", "{constraint}: {} " + template, where, *values)


def refused(key: str, place: SchemaPlace, *values: object) -> RequestError:
    """An error about a keyword of the standard that cannot be honoured there."""
    return fault(place.pointer, f"cannot be honoured: {ADVICE[key]}", *values)


def _is_natural(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_name_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) and value else [value]
    return all(name in (*TYPES, "integer") for name in names if isinstance(name, str)) and _is_name_list(names)


def _is_of(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


_NATURAL = ("a whole number that is not negative", _is_natural)
_NUMBER = ("a number", _is_number)
_SCHEMA = ("a schema: an object, or true or false", _is_of(dict, bool))
_SCHEMAS = ("a list of one or more schemas", lambda value: isinstance(value, list) and len(value) > 0)
_MAP = ("an object of schemas by name", _is_of(dict))
_TEXT = ("a text", _is_of(str))
_BOUND = ("a number (or in draft 4, true or false)", lambda value: _is_number(value) or isinstance(value, bool))

VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "type": ("one of null, boolean, number, integer, string, array and object, or a list of these", _is_type),
    "const": ("any value", lambda value: True),
    "enum": ("a list of values", _is_of(list)),
    "$ref": _TEXT,
    "allOf": _SCHEMAS,
    "anyOf": _SCHEMAS,
    "oneOf": _SCHEMAS,
    "not": _SCHEMA,
    "if": _SCHEMA,
    "then": _SCHEMA,
    "else": _SCHEMA,
    "properties": _MAP,
    "patternProperties": _MAP,
    "additionalProperties": _SCHEMA,
    "unevaluatedProperties": _SCHEMA,
    "propertyNames": _SCHEMA,
    "required": ("a list of names", _is_name_list),
    "minProperties": _NATURAL,
    "maxProperties": _NATURAL,
    "dependentRequired": (
        "an object of lists of names",
        lambda value: isinstance(value, dict) and all(_is_name_list(names) for names in value.values()),
    ),
    "dependentSchemas": _MAP,
    "dependencies": _MAP,
    "prefixItems": _SCHEMAS,
    "items": ("a schema, or a list of schemas", _is_of(dict, bool, list)),
    "additionalItems": _SCHEMA,
    "unevaluatedItems": _SCHEMA,
    "contains": _SCHEMA,
    "minContains": _NATURAL,
    "maxContains": _NATURAL,
    "minItems": _NATURAL,
    "maxItems": _NATURAL,
    "uniqueItems": ("true or false", _is_of(bool)),
    "minLength": _NATURAL,
    "maxLength": _NATURAL,
    "pattern": _TEXT,
    "format": _TEXT,
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    "exclusiveMinimum": _BOUND,
    "exclusiveMaximum": _BOUND,
    "multipleOf": ("a number greater than 0", lambda value: _is_number(value) and value > 0),
}
"""What the value of each keyword must be, in words and as a test."""
