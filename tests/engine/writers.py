"""Which module changes a `Request`: while the guard is on, a write from anywhere but the request pool raises."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from headrace.engine.schedule.edits import EditState
from headrace.engine.schedule.request import Request

__all__ = ["only_the_pool_writes"]

ALLOWED = {f"headrace.engine.schedule.{name}" for name in ("pool", "request", "edits")}


def _check(what: str, depth: int = 2) -> None:
    module = sys._getframe(depth).f_globals["__name__"]
    if module.startswith("headrace.") and module not in ALLOWED:
        raise AssertionError(f"{module} changes a request: {what}; only the request pool may")


def _guarded(kind: type, edits: tuple[str, ...]) -> type:
    """A `kind` of container whose in-place `edits` check the module that makes them."""

    def checked(edit: str) -> Any:
        def method(self: Any, *args: Any) -> Any:
            _check("a list or table")
            return getattr(kind, edit)(self, *args)

        return method

    return type(f"Guarded{kind.__name__}", (kind,), {edit: checked(edit) for edit in edits})


EDITS = ("__delitem__", "__setitem__", "clear", "pop")
LIST = _guarded(list, (*EDITS, "__iadd__", "append", "extend", "insert", "remove", "reverse", "sort"))
DICT = _guarded(dict, (*EDITS, "__ior__", "popitem", "setdefault", "update"))


def only_the_pool_writes(patch: pytest.MonkeyPatch) -> None:
    """Turn the guard on until `patch` is undone."""

    def setattr_(self: Request, name: str, value: Any) -> None:
        _check(name)
        guards: dict[type, type] = {list: LIST, dict: DICT}
        guard = guards.get(type(value))
        object.__setattr__(self, name, value if guard is None else guard(value))

    def in_place(method: Any) -> Any:
        def checked(self: EditState, *args: Any) -> Any:
            _check("edits")
            return method(self, *args)

        return checked

    patch.setattr(Request, "__setattr__", setattr_)
    for name in ("append", "current"):
        patch.setattr(EditState, name, in_place(getattr(EditState, name)))
