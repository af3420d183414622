"""What each keyword becomes, in keywords that llguidance honours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

from headrace.grammar.keywords import FORMATS, TYPES, fault, refused
from headrace.grammar.logic import Logic, distinct_values
from headrace.grammar.numbers import MOST, check_step, plain_value
from headrace.grammar.patterns import rust_pattern
from headrace.grammar.places import SchemaPlace, SchemaPlaces
from headrace.grammar.written import Pending, Written, all_of, both, either

__all__ = ["HANDLERS", "SchemaDocument"]

MOST_SETS = 100
"""Of names, of which an object has one."""
NO_ADJACENT = frozenset(
    ("$ref", "allOf", "anyOf", "oneOf", "if", "then", "else", "not", "dependentSchemas", "dependencies", "contains")
)
"""Keywords beside which `unevaluated…` means more than `additional…`."""


class SchemaDocument(Protocol):
    """What a keyword needs of the document around it."""

    strict: bool
    places: SchemaPlaces
    logic: Logic
    referred: set[str]
    calls: dict[str, set[str]]

    def schema(self, node: Any, place: SchemaPlace) -> Written:
        """A schema within it."""

    def name(self, node: Any, place: SchemaPlace) -> str:
        """The definition that a node becomes."""


Handler = Callable[[SchemaDocument, dict[str, Any], SchemaPlace, list[Written]], Written]
"""Of a document, a schema in it, the place of the keyword and what the schema's other rules become."""


def _ref(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    found = document.places.find(node["$ref"], place.base)
    if found is None or not isinstance(found[0], dict | bool):
        raise fault(
            place.pointer, "leads to no schema of this document: write it into $defs, and refer to #/$defs/name"
        )
    name = document.name(*found)
    document.referred.add(name)
    if place.owner is not None:
        document.calls[place.owner].add(name)
    return {"$ref": f"#/$defs/{name}"}


def _all_of(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    parts = (document.schema(part, place.at(i)) for i, part in enumerate(node["allOf"]))
    return both(*({"allOf": [part]} if isinstance(part, dict) else part for part in parts))


def _any_of(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    return either(*(document.schema(part, place.at(i)) for i, part in enumerate(node["anyOf"])))


def _one_of(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, beside: list[Written]) -> Written:
    parts = [document.schema(part, place.at(i)) for i, part in enumerate(node["oneOf"])]
    if len(parts) == 1:
        return parts[0]
    return {"anyOf": Pending(lambda: _exclusive(document, place, parts, beside), parts)}


def _exclusive(
    document: SchemaDocument, place: SchemaPlace, options: list[Written], beside: list[Written]
) -> list[Written]:
    """The schemas of a oneOf, each without those that it overlaps. `beside`: what all its values fit anyway."""
    if distinct_values(options):
        return options
    overlapping: list[list[int]] = [[] for _ in options]
    for i, one in enumerate(options):
        for j, other in enumerate(options[:i]):
            if not document.logic.disjoint([one, *beside], [other, *beside]):
                overlapping[i].append(j)
                overlapping[j].append(i)
        if not document.logic.can_compare():
            raise fault(place.pointer, "has too many schemas to see whether a value could fit two of them: write anyOf")
    made = list(options)
    for i, others in enumerate(overlapping):
        left = document.logic.without(options[i], [options[j] for j in others], beside)
        if left is None:
            raise refused("oneOf", place, *sorted((i, others[0])))
        made[i] = left
    return made


def _not(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    part = document.schema(node["not"], place)
    if isinstance(part, bool):
        return not part

    def find() -> list[Written]:
        opposite = document.logic.opposite(part)
        if opposite is None:
            raise refused("not", place)
        return [opposite]

    return {"anyOf": Pending(find, opposite=part)}


def _if(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    if "then" not in node and "else" not in node:
        return True
    around = SchemaPlace(place.pointer.removesuffix("/if"), place.base, place.owner)
    condition = document.schema(node["if"], place)
    then = document.schema(node.get("then", True), around.at("then"))
    otherwise = document.schema(node.get("else", True), around.at("else"))
    if isinstance(condition, bool):
        return then if condition else otherwise
    if then is True and otherwise is True:
        return True

    def find() -> list[Written]:
        opposite = document.logic.opposite(condition)
        if opposite is None:
            raise refused("if", place)
        return [all_of(condition, then), all_of(opposite, otherwise)]

    return {"anyOf": Pending(find)}


def _dependent_required(
    document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]
) -> Written:
    return both(*(_when_present(name, _needed(name, names)) for name, names in node["dependentRequired"].items()))


def _dependent_schemas(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    parts = node["dependentSchemas"].items()
    return both(*(_when_present(name, document.schema(part, place.at(name))) for name, part in parts))


def _dependencies(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    made = []
    for name, part in node["dependencies"].items():
        if isinstance(part, list) and all(isinstance(other, str) for other in part):
            made.append(_when_present(name, _needed(name, part)))
        else:
            made.append(_when_present(name, document.schema(part, place.at(name))))
    return both(*made)


def _needed(name: str, names: list[str]) -> Written:
    """An object that has some names, and after another one, so that this may come first."""
    return {"properties": {name: True}, "required": list(dict.fromkeys(names))} if names else True


def _when_present(name: str, then: Written) -> Written:
    """A schema for objects that have a property."""
    return then if then is True else {"allOf": [either({"properties": {name: False}}, then)]}


def _names(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    """propertyNames, as an object that has no other names."""
    part = document.schema(node["propertyNames"], place)
    if isinstance(part, bool):
        return part or {"additionalProperties": False}
    kinds = part.get("type", "string")
    if "string" not in ([kinds] if isinstance(kinds, str) else kinds):
        return {"additionalProperties": False}
    keys = part.keys() - {"type"}
    if keys <= {"const"} or keys <= {"enum"}:
        listed = [part["const"]] if "const" in part else part.get("enum")
        if listed is None:
            return True
        return {"properties": {name: True for name in listed if isinstance(name, str)}, "additionalProperties": False}
    if keys == {"pattern"}:
        pattern = part["pattern"]
    elif keys <= {"minLength", "maxLength"}:
        pattern = f"^(?s:.{{{part.get('minLength', 0)},{part.get('maxLength', '')}}})$"
    else:
        raise refused("propertyNames", place)
    return {"patternProperties": {pattern: True}, "additionalProperties": False}


def _contains(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    least, most = int(node.get("minContains", 1)), node.get("maxContains")
    if node["contains"] in (True, {}):
        return {"minItems": _few(least, place), **({} if most is None else {"maxItems": int(most)})}
    if least == 0 and most is None:
        return True
    if node["contains"] is False and least:
        return {"type": [name for name in TYPES if name != "array"]}
    raise refused("contains", place)


def _unique(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    if node["uniqueItems"] and node.get("maxItems", 2) > 1:
        raise refused("uniqueItems", place)
    return True


def _unevaluated(key: str, instead: str) -> Handler:
    """`unevaluated…` where it says the same as `additional…` or `items`."""

    def handler(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
        made = document.schema(node[key], place.inside())
        if made is True or (instead in node and not isinstance(node[instead], list)):
            return True  # each of them is judged already
        if node.keys() & NO_ADJACENT or isinstance(node.get("items"), list):
            raise refused(key, place)
        return {instead: made}

    return handler


def _type(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    return {"type": node["type"]}


def _const(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    return {"const": _plain(node["const"], place)}


def _enum(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    return {"enum": [_plain(value, place.at(i)) for i, value in enumerate(node["enum"])]} if node["enum"] else False


def _plain(value: Any, place: SchemaPlace) -> Any:
    try:
        return plain_value(value)
    except ValueError as error:
        raise fault(place.pointer, "cannot be honoured: {}", error) from None


def _properties(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    return {
        "properties": {name: document.schema(part, place.inside(name)) for name, part in node["properties"].items()}
    }


def _patterns(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    made: dict[str, Written] = {}
    for pattern, part in node["patternProperties"].items():
        name = _pattern_text(pattern, place.at(pattern))
        made[name] = all_of(made.get(name, True), document.schema(part, place.inside(pattern)))
    return {"patternProperties": made}


def _pattern_text(pattern: str, place: SchemaPlace) -> str:
    try:
        return rust_pattern(pattern)
    except ValueError as error:
        raise fault(place.pointer, "is a pattern that cannot be honoured: {}", error) from None


def _additional(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    return {"additionalProperties": document.schema(node["additionalProperties"], place.inside())}


def _required(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    return {"required": list(dict.fromkeys(node["required"]))} if node["required"] else True


def _least_properties(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    required = node.get("required", ())
    least = _few(node["minProperties"], place) - len(set(required))
    if least <= 0:
        return True
    closed = node.get("additionalProperties", True) is False and not node.get("patternProperties")
    if least > 1 and not closed:
        raise fault(
            place.pointer,
            "cannot be honoured: no grammar sees a name that is repeated, so {} may be fewer: list them in required",
            node["minProperties"],
        )
    optional = [name for name in node.get("properties", {}) if name not in required]
    if not optional:
        return {"minProperties": int(node["minProperties"])}
    made: list[Written] = [{"required": names} for names in _sets(optional, least, place)]
    if not closed:
        made.append({"properties": dict.fromkeys(optional, False), "minProperties": int(node["minProperties"])})
    return {"allOf": [{"anyOf": made}]} if made else {"type": [name for name in TYPES if name != "object"]}


def _most_properties(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    required, most = node.get("required", ()), int(node["maxProperties"])
    closed = node.get("additionalProperties", True) is False and not node.get("patternProperties")
    optional = [name for name in node.get("properties", {}) if name not in required]
    more = most - len(set(required))
    if not closed or not optional or more < 0:
        return {"maxProperties": most}
    absent = _sets(optional, max(0, len(optional) - more), place)
    return {"allOf": [{"anyOf": [{"properties": dict.fromkeys(names, False)} for names in absent]}]}


def _sets(names: list[str], size: int, place: SchemaPlace) -> list[list[str]]:
    """Every set of so many names."""
    if math.comb(len(names), size) > MOST_SETS:
        raise fault(place.pointer, "cannot be honoured: it leaves more than {} sets of names", MOST_SETS)
    return [list(chosen) for chosen in itertools.combinations(names, size)]


def _items(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    value = node["items"]
    if not isinstance(value, list):
        return {"items": document.schema(value, place.inside())}
    if "prefixItems" in node and document.places.draft >= 2020:
        raise fault(place.pointer, "must be a schema, as prefixItems is the list of them")
    first = [document.schema(part, place.inside(i)) for i, part in enumerate(value)]
    around = SchemaPlace(place.pointer.removesuffix("/items"), place.base)
    rest = document.schema(node.get("additionalItems", True), around.at("additionalItems"))
    return {"prefixItems": first, "items": rest} if first else {"items": rest}


def _prefix_items(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    if document.places.draft < 2020:
        return True  # a keyword that the schema's own draft does not have
    return {"prefixItems": [document.schema(part, place.inside(i)) for i, part in enumerate(node["prefixItems"])]}


def _least(key: str) -> Handler:
    return lambda document, node, place, _: {key: _few(node[key], place)}


def _few(count: float, place: SchemaPlace) -> int:
    if count > MOST:
        raise fault(place.pointer, "cannot be honoured: more than {} are not counted", MOST)
    return int(count)


def _natural(key: str) -> Handler:
    return lambda document, node, place, _: {key: int(node[key])}


def _pattern(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    return {"pattern": _pattern_text(node["pattern"], place)}


def _format(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    name = node["format"]
    if name not in FORMATS and document.strict:
        listed = ", ".join(sorted(FORMATS))
        raise fault(
            place.pointer, "is {}, which is none of {}: leave it out, or do not ask for strict", repr(name), listed
        )
    return dict(FORMATS[name]) if name in FORMATS else True


def _bound(key: str, plain: str | None = None) -> Handler:
    """A bound; of an exclusive one, `plain` is the one that draft 4 makes exclusive."""

    def handler(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
        value = node[key]
        if isinstance(value, bool):
            return {key: node[plain]} if value and plain in node else True
        return {key: value}

    return handler


def _step(document: SchemaDocument, node: dict[str, Any], place: SchemaPlace, _: list[Written]) -> Written:
    try:
        check_step(node["multipleOf"])
    except ValueError as error:
        raise fault(place.pointer, "{}", error) from None
    return {"multipleOf": node["multipleOf"]}


HANDLERS: dict[str, Handler] = {
    "$ref": _ref,
    "additionalProperties": _additional,
    "allOf": _all_of,
    "anyOf": _any_of,
    "const": _const,
    "contains": _contains,
    "dependencies": _dependencies,
    "dependentRequired": _dependent_required,
    "dependentSchemas": _dependent_schemas,
    "enum": _enum,
    "exclusiveMaximum": _bound("exclusiveMaximum", "maximum"),
    "exclusiveMinimum": _bound("exclusiveMinimum", "minimum"),
    "format": _format,
    "if": _if,
    "items": _items,
    "maxItems": _natural("maxItems"),
    "maxLength": _natural("maxLength"),
    "maxProperties": _most_properties,
    "maximum": _bound("maximum"),
    "minItems": _least("minItems"),
    "minLength": _least("minLength"),
    "minProperties": _least_properties,
    "minimum": _bound("minimum"),
    "multipleOf": _step,
    "not": _not,
    "oneOf": _one_of,
    "pattern": _pattern,
    "patternProperties": _patterns,
    "prefixItems": _prefix_items,
    "properties": _properties,
    "propertyNames": _names,
    "required": _required,
    "type": _type,
    "unevaluatedItems": _unevaluated("unevaluatedItems", "items"),
    "unevaluatedProperties": _unevaluated("unevaluatedProperties", "additionalProperties"),
    "uniqueItems": _unique,
}
"""Of each keyword that says something by itself."""
