"""What can be said of schemas: the opposite of one, whether two have a value in common, whether one has any."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from headrace.grammar.keywords import TYPES
from headrace.grammar.patterns import escaped
from headrace.grammar.written import Pending, Written, all_of, either, schemas_of

__all__ = ["Logic", "distinct_values"]

STEPS = 100_000
"""Schemas that are looked at for one purpose in one document; what is not compared counts as overlapping."""
LONGEST_OPPOSITE = 2_000
"""Schemas that are turned around for one opposite, and the references that are followed."""
DEEPEST_OPPOSITE = 4
FEW, MOST_WAYS = 2, 5_000
"""Schemas that are excluded exactly; and ways to combine the opposites of all excluded ones."""
LONGEST = 64
"""The most characters of an excluded text: its complement becomes a pattern."""
LEAST = {
    "minLength": ("string", "maxLength"),
    "minItems": ("array", "maxItems"),
    "minProperties": ("object", "maxProperties"),
}
MOST = {most: (kind, least) for least, (kind, most) in LEAST.items()}
RULES_OF = {
    "null": (),
    "boolean": (),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": (
        *("properties", "patternProperties", "additionalProperties", "required"),
        *("minProperties", "maxProperties"),
    ),
}
"""The keywords that judge a type."""
BOUNDS = {
    "minimum": "exclusiveMaximum",
    "exclusiveMinimum": "maximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMaximum": "minimum",
}
"""A bound, and the one that the opposite has."""


class Logic:
    """What can be said of schemas that lead to one document's definitions."""

    def __init__(self) -> None:
        self.definitions: dict[str, Written] = {}
        self._steps = self._left = 0

    def finish(self) -> None:
        """Find the options of all that is pending. Raises what finding them raises."""
        found: list[tuple[Pending, list[Written]]] = []
        todo: list[Written] = list(self.definitions.values())
        seen: set[int] = set()
        while todo:
            for schema in schemas_of(todo, seen):
                if isinstance(options := schema.get("anyOf"), Pending):
                    found.append((options, options.find()))
            todo = [
                schema for _, made in found for schema in made if isinstance(schema, dict) and id(schema) not in seen
            ]
        # Written only when all are found: one asks what another leaves, and a part of that would be wrong.
        for options, made in found:
            options[:] = made

    def drop_endless(self) -> None:
        """Make definitions false that require themselves in their own values, so that none of these ever ends."""
        found: set[str] = set()
        before = -1
        self._left = STEPS
        while len(found) > before and self._left > 0:
            before = len(found)
            for name in reversed(self.definitions):  # those that others need come last
                if name not in found and self._ends(self.definitions[name], found):
                    found.add(name)
        if self._left <= 0:
            return
        endless = self.definitions.keys() - found
        for schema in schemas_of(self.definitions.values()):
            if schema.get("$ref", "").rpartition("/")[2] in endless:
                schema.clear()
                schema["enum"] = []  # llguidance takes a false definition for an error, even where none needs it
        self.definitions.update(dict.fromkeys(endless, False))

    def can_compare(self) -> bool:
        """Whether `disjoint` still compares."""
        return self._steps <= STEPS

    def _ends(self, schema: Written, found: set[str]) -> bool:
        self._left -= 1
        if isinstance(schema, bool):
            return schema
        if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in found:
            return False
        if not all(self._ends(part, found) for part in schema.get("allOf", ())):
            return False
        if "anyOf" in schema and not any(self._ends(option, found) for option in schema["anyOf"]):
            return False
        kinds = _kinds_of_type(schema)
        if kinds == {"object"}:
            needed = [_property(schema, name) for name in schema.get("required", ())]
        elif kinds == {"array"}:
            first = schema.get("prefixItems", [])
            least = schema.get("minItems", 0)
            needed = [*first, *[schema.get("items", True)] * (least > len(first))][:least]
        else:
            return True
        return all(self._ends(part, found) for part in needed)

    def opposite(self, schema: Written) -> Written | None:
        """What does not fit a schema; None where no schema says it exactly, or none that is short."""
        self._left = LONGEST_OPPOSITE
        return self._opposite(schema, DEEPEST_OPPOSITE, True)

    def without(self, schema: Written, others: Sequence[Written], beside: Sequence[Written]) -> Written | None:
        """What fits one schema and none of the others; None where that cannot be said. `beside` holds for all of it.

        Of objects it may be a part: those that lack a property, where it cannot be said that the property is wrong.
        """
        left: list[Written] = []
        lost: set[str] = set()
        ways = 1
        for other in others:
            kinds = {k for k in TYPES if not self.disjoint([schema, *beside, {"type": k}], [other, {"type": k}])}
            everything = {kind for kind in kinds if _fits_all(self._parts([other]), kind)}
            lost |= everything
            if kinds == everything:
                continue
            if (opposite := self._opposite_in(kinds - everything, other, len(others) <= FEW)) is None:
                return None
            ways *= len(opposite.get("anyOf", "1")) if isinstance(opposite, dict) else 1
            left.append(opposite)
        if lost:
            left.append(_of_types(set(TYPES) - lost))
        return all_of(schema, *left) if ways <= MOST_WAYS else None

    def _opposite_in(self, kinds: set[str], schema: Written, exact: bool) -> Written | None:
        """What does not fit a schema: if not `exact`, a part of it where it is about objects."""
        if exact and (opposite := self.opposite(schema)) is not None:
            return opposite
        self._left = LONGEST_OPPOSITE
        opposite = self._opposite(schema, DEEPEST_OPPOSITE, False)
        if opposite is not None and "object" in kinds:
            parts = self._parts([opposite])
            if parts is not None and "object" in self._kinds_of_options(parts):
                return opposite
        return None if exact else self.opposite(schema)

    def _kinds_of_options(self, parts: list[dict[str, Any]]) -> set[str]:
        """The types that a value which fits all parts may have, where each option of an `anyOf` may have its own."""
        kinds = _kinds(parts)
        for options in (part["anyOf"] for part in parts if "anyOf" in part):
            opened = [self._parts([option]) for option in options]
            kinds &= set().union(*(_kinds(option) for option in opened if option is not None))
        return kinds

    def _opposite(self, schema: Written, depth: int, exact: bool) -> Written | None:
        self._left -= 1
        if self._left < 0:
            return None
        if isinstance(schema, bool):
            return not schema
        keys = schema.keys() - {"properties"} if not exact and "required" in schema else schema.keys()
        options = _each(self._opposite_of(key, schema[key], depth, exact) for key in schema if key in keys)
        return None if options is None else either(*options)

    def _opposite_of(self, key: str, value: Any, depth: int, exact: bool) -> Written | None:
        if key == "$ref":
            target = self.definitions.get(value.rpartition("/")[2], {})
            return self._opposite(target, depth - 1, exact) if depth else None
        if isinstance(value, Pending) and (value.opposite is not None or exact):
            return value.opposite
        if key in ("allOf", "anyOf"):
            parts = _each(self._opposite(part, depth, exact) for part in value)
            return None if parts is None else (either if key == "allOf" else all_of)(*parts)
        if key == "properties":
            found = {name: self._opposite(part, depth, exact) for name, part in value.items()}
            if exact and None in found.values():
                return None
            wrong = ((name, part) for name, part in found.items() if part is not None and part is not False)
            return either(*({"type": "object", "properties": {n: p}, "required": [n]} for n, p in wrong))
        if key in ("additionalProperties", "items") and value in (True, {}):
            return False
        if key in ("additionalProperties", "patternProperties") and not exact:
            return False
        return _opposite_of_value(key, value)

    def disjoint(self, one: Sequence[Written], other: Sequence[Written], depth: int = 20) -> bool:
        """Whether no value fits all of `one` and all of `other`, as far as types, constants and bounds tell."""
        self._steps += 1
        if self._steps > STEPS or not depth:
            return False
        a, b = self._parts(one), self._parts(other)
        if a is None or b is None:
            return True
        common = _kinds(a) & _kinds(b)
        if all(_apart(kind, a, b) or (kind == "object" and self._objects_apart(a, b, depth)) for kind in common):
            return True
        return self._options_apart(a, b, depth) or self._options_apart(b, a, depth)

    def _options_apart(self, a: list[dict[str, Any]], b: list[dict[str, Any]], depth: int) -> bool:
        for i, part in enumerate(a):
            if "anyOf" in part:
                rest = [*a[:i], {key: value for key, value in part.items() if key != "anyOf"}, *a[i + 1 :]]
                return all(self.disjoint([option, *rest], b, depth - 1) for option in part["anyOf"])
        return False

    def _objects_apart(self, a: list[dict[str, Any]], b: list[dict[str, Any]], depth: int) -> bool:
        names = {name for part in (*a, *b) for name in part.get("required", ())}
        return any(
            self.disjoint([_property(part, name) for part in a], [_property(part, name) for part in b], depth - 1)
            for name in sorted(names)
        )

    def _parts(self, schemas: Iterable[Written]) -> list[dict[str, Any]] | None:
        """Schemas that a value must fit, each $ref and allOf opened; None where nothing fits."""
        out: list[dict[str, Any]] = []
        todo, seen = list(schemas), set[str]()
        while todo:
            schema = todo.pop()
            if schema is False:
                return None
            if schema is True:
                continue
            if (name := schema.get("$ref")) and name not in seen:
                seen.add(name)
                todo.append(self.definitions.get(name.rpartition("/")[2], True))
            todo += schema.get("allOf", ())
            out.append({key: value for key, value in schema.items() if key not in ("$ref", "allOf")})
        return out


def _each(found: Iterable[Written | None]) -> list[Written] | None:
    """All of them; None as soon as one is missing."""
    out: list[Written] = []
    for one in found:
        if one is None:
            return None
        out.append(one)
    return out


def distinct_values(schemas: Iterable[Written]) -> bool:
    """Whether all schemas list their values, and none is in two of them."""
    seen: set[str] = set()
    for schema in schemas:
        values = None if isinstance(schema, bool) else _values(schema)
        if values is None:
            return False
        texts = {json.dumps(_plain_numbers(value), sort_keys=True) for value in values}
        if not seen.isdisjoint(texts):
            return False
        seen |= texts
    return True


def _plain_numbers(value: Any) -> Any:
    """A value in which equal numbers are written alike."""
    if isinstance(value, list):
        return [_plain_numbers(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain_numbers(item) for name, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _opposite_of_value(key: str, value: Any) -> Written | None:
    """Of a keyword that has no schemas."""
    if key == "type":
        names = {value} if isinstance(value, str) else set(value)
        if "integer" in names and "number" not in names:
            return None  # 1.0 is an integer, but not as llguidance writes it
        return _of_types(set(TYPES) - names)
    if key in ("const", "enum"):
        return _opposite_of_values(value if key == "enum" else [value])
    if key == "required":
        return either(*({"type": "object", "properties": {name: False}} for name in value))
    if key in BOUNDS:
        return {"type": "number", BOUNDS[key]: value}
    if key in LEAST:
        kind, most = LEAST[key]
        return {"type": kind, most: value - 1} if value else False
    if key in MOST and not (key == "maxProperties" and value):  # a name that is repeated would count twice
        kind, least = MOST[key]
        return {"type": kind, least: value + 1}
    return None


def _opposite_of_values(values: list[Any]) -> Written | None:
    kinds = {_kind(value) for value in values}
    if kinds & {"array", "object"}:
        return None
    options = [_of_types(set(TYPES) - kinds)]
    texts = [value for value in values if isinstance(value, str)]
    if texts:
        if max(map(len, texts)) > LONGEST or sum(map(len, texts)) > 20 * LONGEST:
            return None
        options.append({"type": "string", "pattern": f"^(?:{_other_texts(texts)})$"})
    if "boolean" in kinds and (left := [value for value in (True, False) if value not in _booleans(values)]):
        options.append({"enum": left})
    numbers = sorted(value for value in values if _kind(value) == "number")
    if numbers:
        options.append({"type": "number", "exclusiveMaximum": numbers[0]})
        options.append({"type": "number", "exclusiveMinimum": numbers[-1]})
        options += [
            {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
            for low, high in zip(numbers, numbers[1:])
            if low < high
        ]
    return either(*options)


def _booleans(values: list[Any]) -> list[bool]:
    return [value for value in values if isinstance(value, bool)]


def _other_texts(texts: Sequence[str]) -> str:
    """A pattern of every text but these: it ends early, goes another way, or goes on."""
    options = [] if "" in texts else [""]
    firsts = sorted({text[0] for text in texts if text})
    options.append(f"[^{''.join(map(escaped, firsts))}](?s:.*)" if firsts else "(?s:.+)")
    for first in firsts:
        rest = _other_texts([text[1:] for text in texts if text.startswith(first)])
        options.append(f"{escaped(first)}(?:{rest})")
    return "|".join(options)


def _of_types(names: set[str]) -> Written:
    kept = [name for name in TYPES if name in names]
    return {"type": kept if len(kept) > 1 else kept[0]} if kept else False


def _kind(value: Any) -> str:
    """The type of a value in JSON."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _kinds_of_type(part: dict[str, Any]) -> set[str]:
    names = part.get("type", TYPES)
    return {"number" if name == "integer" else name for name in ([names] if isinstance(names, str) else names)}


def _kinds(parts: list[dict[str, Any]]) -> set[str]:
    """The types that a value which fits all parts may have."""
    kinds = set(TYPES)
    for part in parts:
        kinds &= _kinds_of_type(part)
        if (values := _values(part)) is not None:
            kinds &= {_kind(value) for value in values}
    return kinds


def _fits_all(parts: list[dict[str, Any]] | None, kind: str) -> bool:
    """Whether every value of a type fits all parts, which can be told where none says anything of that type."""
    told = {"const", "enum", "anyOf", *RULES_OF[kind]}
    return parts is not None and all(
        told.isdisjoint(part) and ("type" not in part or kind in ([part["type"], *part["type"]])) for part in parts
    )


def _values(part: dict[str, Any]) -> list[Any] | None:
    return [part["const"]] if "const" in part else part.get("enum")


def _property(part: dict[str, Any], name: str) -> Written:
    """What a part says of a property, where it is simple to tell."""
    if name in part.get("properties", {}):
        found: Written = part["properties"][name]
        return found
    return True if "patternProperties" in part else part.get("additionalProperties", True)


def _apart(kind: str, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    """Whether no value of a type fits all parts of both, by constants and bounds."""
    parts = [*a, *b]
    if kind == "number" and _number_range_is_empty(parts):
        return True
    for least, (of, most) in LEAST.items():
        lows = [part[least] for part in parts if least in part]
        highs = [part[most] for part in parts if most in part]
        if of == kind and lows and highs and max(lows) > min(highs):
            return True
    listed = [values for part in parts if (values := _values(part)) is not None]
    if not listed or kind in ("array", "object"):
        return False
    left = [value for value in listed[0] if _kind(value) == kind]
    for values in listed[1:]:
        left = [value for value in left if any(_kind(v) == kind and v == value for v in values)]
    return not any(_fits_bounds(value, parts) for value in left)


def _number_range_is_empty(parts: list[dict[str, Any]]) -> bool:
    lows = [
        (Fraction(p[key]), key == "exclusiveMinimum")
        for p in parts
        for key in ("minimum", "exclusiveMinimum")
        if key in p
    ]
    highs = [
        (Fraction(p[key]), key == "exclusiveMaximum")
        for p in parts
        for key in ("maximum", "exclusiveMaximum")
        if key in p
    ]
    return any(low > high or (low == high and (a or b)) for low, a in lows for high, b in highs)


def _fits_bounds(value: Any, parts: list[dict[str, Any]]) -> bool:
    if isinstance(value, str):
        return all(p.get("minLength", 0) <= len(value) <= p.get("maxLength", len(value)) for p in parts)
    if _kind(value) == "number":
        return not _number_range_is_empty([*parts, {"minimum": value, "maximum": value}])
    return True
