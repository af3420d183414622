"""Calls whose result or error every rank gets, so that no rank waits for another that has failed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import headrace.errors
from headrace.errors import HeadraceError
from headrace.parallel.mesh import Mesh

__all__ = ["on_all_ranks", "on_first_rank"]

T = TypeVar("T")


def on_all_ranks(mesh: Mesh, function: Callable[[], T]) -> list[T]:
    """Call it on each rank: the results in rank order, decoded from JSON. Every rank calls this.

    If it raises a `HeadraceError` or an `OSError`, every rank raises the error of the first rank that failed.
    """
    return [_result(outcome) for outcome in mesh.all_gather_object(_outcome(function))]


def on_first_rank(mesh: Mesh, function: Callable[[], T]) -> T:
    """The same on rank 0 alone: its result or error, on every rank."""
    outcome = json.dumps(_outcome(function)).encode() if mesh.rank == 0 else None
    result: T = _result(json.loads(mesh.broadcast(outcome)))
    return result


def _outcome(function: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": function()}
    except HeadraceError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        return {"errno": error.errno, "message": error.strerror or str(error), "file": str(error.filename or "")}


def _result(outcome: Mapping[str, Any]) -> Any:
    if "error" in outcome:
        raise getattr(headrace.errors, outcome["error"])(outcome["message"])
    if "errno" in outcome:
        raise OSError(outcome["errno"], outcome["message"], outcome["file"] or None)
    return outcome["result"]
