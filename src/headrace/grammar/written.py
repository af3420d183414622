"""Schemas in keywords of llguidance, as they are written: both of two, either, and those within them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["Pending", "Written", "all_of", "both", "either", "schemas_of"]

Written = dict[str, Any] | bool
"""A schema in keywords of llguidance; a $ref leads to a definition."""


def both(*schemas: Written) -> Written:
    """What fits all of them; keywords of several become those of one schema, so they must not see each other."""
    out: dict[str, Any] = {}
    for schema in schemas:
        if schema is False:
            return False
        if schema is True:
            continue
        if schema.keys() == {"allOf"} or out.keys().isdisjoint(schema):
            taken = out.get("allOf", [])
            out.update(schema)
            if "allOf" in out:
                out["allOf"] = [*taken, *schema.get("allOf", [])]
        else:
            out["allOf"] = [*out.get("allOf", []), schema]
    return out or True


def all_of(*schemas: Written) -> Written:
    """What fits all of them, whatever keywords they have; one alone stays as it is."""
    left = [schema for schema in schemas if schema is not True]
    return left[0] if len(left) == 1 else both(*({"allOf": [s]} if isinstance(s, dict) else s for s in left))


def either(*schemas: Written) -> Written:
    """What fits one of them or more."""
    left = [schema for schema in schemas if schema is not False]
    if not left:
        return False
    if True in left or {} in left:
        return True
    return left[0] if len(left) == 1 else {"anyOf": left}


class Pending(list[Written]):
    """Options of an `anyOf` that are found when all definitions are known; until then they have more values."""

    def __init__(
        self, find: Callable[[], list[Written]], options: Iterable[Written] = (True,), opposite: Written | None = None
    ) -> None:
        super().__init__(options)
        self.find = find
        self.opposite = opposite
        """What does not fit them, where that is known already."""


def schemas_of(schemas: Iterable[Written], seen: set[int] | None = None) -> Iterator[dict[str, Any]]:
    """Each of these schemas and of those within them, once. `seen`: identities of those that were given already."""
    seen = set() if seen is None else seen
    todo = list(schemas)
    while todo:
        schema = todo.pop()
        if isinstance(schema, bool) or id(schema) in seen:
            continue
        seen.add(id(schema))
        for key in ("allOf", "anyOf", "prefixItems"):
            todo += schema.get(key, ())
        for key in ("properties", "patternProperties"):
            todo += schema.get(key, {}).values()
        todo += [schema[key] for key in ("items", "additionalProperties") if key in schema]
        yield schema
