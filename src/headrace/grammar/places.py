"""Where the schemas of a document are: base URIs, anchors and what each `$ref` means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

__all__ = ["SchemaPlace", "SchemaPlaces"]

SCHEMAS = frozenset(
    {
        "additionalItems",
        "additionalProperties",
        "contains",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
"""Keywords whose value is a schema; that of `items` may be a list of them."""
LISTS = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
MAPS = frozenset({"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"})
"""Keywords whose value has schemas by name."""


@dataclass(frozen=True, slots=True)
class SchemaPlace:
    """A place in the document: its JSON pointer, the base URI there, and the definition that it is a part of."""

    pointer: str = "#"
    base: str = ""
    owner: str | None = None
    """The definition whose instance this place judges too; None within an array or object of it."""

    def at(self, *keys: str | int) -> SchemaPlace:
        """A place that judges the same instance."""
        steps = (str(key).replace("~", "~0").replace("/", "~1") for key in keys)
        return replace(self, pointer="/".join((self.pointer, *steps)))

    def inside(self, *keys: str | int) -> SchemaPlace:
        """A place that judges an item or a property."""
        return replace(self.at(*keys), owner=None)


class SchemaPlaces:
    """The base URIs and anchors of one document, found once."""

    def __init__(self, root: Any) -> None:
        self.root = root
        written = root.get("$schema") if isinstance(root, dict) else None
        self.draft = _draft(written) if isinstance(written, str) else 2020
        """4, 6, 7, 2019 or 2020."""
        self._bases: dict[int, str] = {}
        self._found: dict[str, tuple[Any, str]] = {"": (root, "#")}
        self._walk()

    def base(self, node: dict[str, Any], base: str) -> str:
        """The base URI within a schema, given the one around it."""
        return self._bases.get(id(node), base)

    def find(self, reference: str, base: str) -> tuple[Any, SchemaPlace] | None:
        """What a `$ref` leads to, and where that is; None: nothing in this document."""
        address, fragment = _joined(base, reference)
        if found := self._found.get(f"{address}#{fragment}" if fragment else address):
            return found[0], SchemaPlace(
                found[1], self.base(found[0], address) if isinstance(found[0], dict) else address
            )
        start = self._found.get(address)
        if start is None or (fragment and not fragment.startswith("/")):
            return None
        return self._follow(start, unquote(fragment), address)

    def _follow(self, start: tuple[Any, str], fragment: str, base: str) -> tuple[Any, SchemaPlace] | None:
        node, place = start[0], SchemaPlace(start[1], base)
        for step in fragment.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                return None
            place = place.at(key)
            if isinstance(node, dict):
                place = replace(place, base=self.base(node, place.base))
        return node, place

    def _walk(self) -> None:
        """Every schema, without recursion."""
        todo: list[tuple[Any, str, str]] = [(self.root, "", "#")]
        while todo:
            node, base, pointer = todo.pop()
            if not isinstance(node, dict):
                continue
            base = self._read_names(node, base, pointer)
            place = SchemaPlace(pointer)
            for key, value in node.items():
                if key in SCHEMAS and isinstance(value, dict):
                    todo.append((value, base, place.at(key).pointer))
                elif key in LISTS and isinstance(value, list):
                    todo += [(item, base, place.at(key, i).pointer) for i, item in enumerate(value)]
                elif key in MAPS and isinstance(value, dict):
                    todo += [(item, base, place.at(key, name).pointer) for name, item in value.items()]

    def _read_names(self, node: dict[str, Any], base: str, pointer: str) -> str:
        own = node.get("$id", node.get("id") if self.draft <= 4 or pointer == "#" else None)
        if isinstance(own, str) and not ("$ref" in node and self.draft <= 7):
            address, fragment = _joined(base, own)
            if fragment and not fragment.startswith("/"):
                self._found.setdefault(f"{address}#{fragment}", (node, pointer))  # how drafts to 7 write an anchor
            elif not own.startswith("#"):
                base = address
                self._found.setdefault(base, (node, pointer))
        for key in ("$anchor", "$dynamicAnchor"):
            if isinstance(anchor := node.get(key), str):
                self._found.setdefault(f"{base}#{anchor}", (node, pointer))
        self._bases[id(node)] = base
        return base


def _joined(base: str, reference: str) -> tuple[str, str]:
    """Address and fragment of a reference; urllib joins no fragment to a base like urn:…"""
    if not reference or reference.startswith("#"):
        return base, reference[1:]
    try:
        address, fragment = urldefrag(urljoin(base, reference))
    except ValueError:
        return reference, ""
    return address, fragment


def _draft(written: str) -> int:
    for draft, names in ((4, ("draft-03", "draft-04")), (6, ("draft-06",)), (7, ("draft-07",)), (2019, ("2019-09",))):
        if any(name in written for name in names):
            return draft
    return 2020
