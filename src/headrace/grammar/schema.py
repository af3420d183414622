"""JSON Schema, drafts 4 to 2020-12, as llguidance honours it: what it would not is said, never passed on.

llguidance ignores some rules silently and weakens others, so a schema is written anew from the keywords that it keeps.
The new schema may have fewer values than the old one, never more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from headrace.engine.schedule.constraint import is_text
from headrace.grammar.keywords import ADVICE, ANNOTATIONS, APPLIED, VALUES, fault, refused
from headrace.grammar.logic import Logic
from headrace.grammar.numbers import fit_numbers
from headrace.grammar.places import SchemaPlace, SchemaPlaces
from headrace.grammar.rules import HANDLERS
from headrace.grammar.written import Written, both

__all__ = ["checked_schema"]

MAX_DEPTH = 100
"""Of objects and lists within each other; llguidance reads 128."""
TOGETHER = frozenset({"$ref", "allOf", "anyOf", "format", "pattern"})
"""Keywords that mean the same beside any others."""
LEADING = frozenset({"$ref", "allOf", "anyOf", "oneOf"})
"""Keywords whose names come before those of properties, where they stand before it."""
MAX_SIZE = 200_000
"""Values of the schema that is handed on."""


def checked_schema(text: str, strict: bool = False) -> Written:
    """The schema in a JSON text, in keywords that llguidance honours.

    Raises `RequestError` about {constraint} that names a keyword which cannot be honoured, and its place. `strict`
    refuses unknown keywords and formats too; otherwise they are annotations, as the standard says.
    """
    root = _parsed(text)
    try:
        return _Translation(root, strict).whole()
    except RecursionError:
        raise fault("the schema", "is nested too deep once its conditions are written out") from None


def _parsed(text: str) -> Any:
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no number")

    def finite(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(f"{digits[:20]} is too large a number")
        return value

    try:
        root = json.loads(text, parse_constant=no_constant, parse_float=finite)
    except RecursionError:
        raise fault("the schema", "is nested more than {} deep", MAX_DEPTH) from None
    except ValueError as error:
        raise fault("the schema", "is no JSON: {}", error) from None
    if not isinstance(root, dict | bool):
        raise fault("the schema", "must be an object, or true or false")
    level, depth = [root], 0
    while level := [child for node in level for child in _children(node)]:
        if (depth := depth + 1) > MAX_DEPTH:
            raise fault("the schema", "is nested more than {} deep", MAX_DEPTH)
    if not is_text(json.dumps(root, ensure_ascii=False)):
        raise fault("the schema", "has half of a surrogate pair, which is no text")
    return root


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


class _Translation:
    """One document: its root and every schema that a `$ref` reaches become definitions."""

    def __init__(self, root: Any, strict: bool) -> None:
        self.strict = strict
        self.places = SchemaPlaces(root)
        self.logic = Logic()
        self.names: dict[int, str] = {}
        self.waiting: list[tuple[str, Any, SchemaPlace]] = []
        self.referred: set[str] = set()
        self.calls: dict[str, set[str]] = {}
        """The definitions that a definition applies to its own value."""

    def whole(self) -> Written:
        """The root, with the definitions that it needs."""
        root = self.name(self.places.root, SchemaPlace())
        definitions = self.logic.definitions
        while self.waiting:
            name, node, place = self.waiting.pop()
            definitions[name] = self.schema(node, SchemaPlace(place.pointer, place.base, name))
        self._refuse_loops()
        self.logic.finish()
        self.logic.drop_endless()
        if definitions[root] is False:
            raise fault("the schema", "has no value: what it requires contradicts itself or never ends")
        if _size(definitions) > MAX_SIZE:
            raise fault("the schema", "is too large once its conditions are written out")
        try:
            fit_numbers(definitions)
        except ValueError as error:
            raise fault("the schema", "{}", error) from None
        out: Written = {"$ref": f"#/$defs/{root}"} if root in self.referred else definitions.pop(root)
        return {**out, "$defs": definitions} if definitions and isinstance(out, dict) else out

    def schema(self, node: Any, place: SchemaPlace) -> Written:
        """A schema in keywords of llguidance."""
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise fault(place.pointer, "must be a schema: an object, or true or false")
        place = SchemaPlace(place.pointer, self.places.base(node, place.base), place.owner)
        if "$ref" in node and self.places.draft <= 7:
            node = {"$ref": node["$ref"]}  # it had no siblings then
        rules: list[Written] = []
        before: list[Written] = []
        after: list[Written] = []
        for key, value in node.items():
            if not self._is_rule(key, value, place):
                continue
            made = HANDLERS[key](self, node, place.at(key), rules)
            if key not in APPLIED:
                # llguidance closes an object at a const or a schema: what is beside each other stays so.
                (before if key in ("const", "enum") else after if _is_apart(made) else rules).append(made)
                continue
            if isinstance(made, dict) and not made.keys() <= TOGETHER:
                made = {"allOf": [made]}  # its additionalProperties must not see the names of this schema
            if key in LEADING and "properties" in node and list(node).index(key) < list(node).index("properties"):
                before.append(made)  # names come in the order in which a schema lists them
            else:
                after.append(made)
        return both(*before, *rules, *after)

    def _is_rule(self, key: str, value: Any, place: SchemaPlace) -> bool:
        """Whether a keyword says anything of a value. Raises where it cannot be read, or is unknown and strict."""
        if key in ANNOTATIONS:
            return False
        if key in VALUES:
            kind, fits = VALUES[key]
            if not fits(value):
                raise fault(place.at(key).pointer, "must be {}", kind)
        elif key in ADVICE:
            raise refused(key, place.at(key))
        elif self.strict:
            raise fault(place.at(key).pointer, "is no keyword of JSON Schema: leave it out, or do not ask for strict")
        return key in HANDLERS

    def name(self, node: Any, place: SchemaPlace) -> str:
        """The definition that a node becomes. Booleans are alike, so they have no identity."""
        key = id(node) if isinstance(node, dict) else -1 - bool(node)
        if key not in self.names:
            self.names[key] = name = f"r{len(self.names)}"
            self.calls[name] = set()
            self.waiting.append((name, node, place))
        return self.names[key]

    def _refuse_loops(self) -> None:
        """A definition that applies itself to its own value means nothing."""
        left = {name: len(called) for name, called in self.calls.items()}
        callers: dict[str, list[str]] = {name: [] for name in left}
        for name, called in self.calls.items():
            for other in called:
                callers[other].append(name)
        free = [name for name, count in left.items() if not count]
        for name in free:
            for caller in callers[name]:
                left[caller] -= 1
                if not left[caller]:
                    free.append(caller)
        if len(free) < len(left):
            raise fault("a $ref", "leads back to itself for the same value, so that no JSON can be judged by it")


def _is_apart(made: Written) -> bool:
    """Whether a keyword became a schema of its own."""
    return isinstance(made, dict) and "allOf" in made


def _size(definitions: dict[str, Any]) -> int:
    """How many values a document has when it is written out; a part may stand at several places."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if not isinstance(node, dict | list):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
        return sizes[id(node)]

    return size(definitions)
