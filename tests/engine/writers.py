"""Which module changes a `Request`: while the guard is on, a write from anywhere but the request pool raises."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from headrace.engine.schedule.request import Request

__all__ = ["only_the_pool_writes"]

ALLOWED = {"headrace.engine.schedule.pool", "headrace.engine.schedule.request"}


def _check(what: str, depth: int = 2) -> None:
    module = sys._getframe(depth).f_globals["__name__"]
    if module.startswith("headrace.") and module not in ALLOWED:
        raise AssertionError(f"{module} changes {what} of a request; only the request pool may")


class _Tokens(list):
    """A list of tokens that checks who edits it in place."""

    def append(self, token: int) -> None:
        _check("token_ids")
        super().append(token)

    def extend(self, tokens: Any) -> None:
        _check("token_ids")
        super().extend(tokens)

    def __delitem__(self, at: Any) -> None:
        _check("token_ids")
        super().__delitem__(at)

    def __setitem__(self, at: Any, token: Any) -> None:
        _check("token_ids")
        super().__setitem__(at, token)


def only_the_pool_writes(patch: pytest.MonkeyPatch) -> None:
    """Turn the guard on until `patch` is undone."""

    def setattr_(self: Request, name: str, value: Any) -> None:
        _check(name)
        object.__setattr__(self, name, _Tokens(value) if name == "token_ids" else value)

    patch.setattr(Request, "__setattr__", setattr_)
