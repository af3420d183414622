"""What ranks decide together: an answer or an error, the same on all of them, so that none waits for another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import headrace.errors
from headrace.errors import HeadraceError
from headrace.parallel.mesh import Mesh

__all__ = ["of_all", "of_first"]

T = TypeVar("T")


def of_all(mesh: Mesh, ask: Callable[[], T]) -> list[T]:
    """What each rank finds, in rank order, on every rank, as JSON gives it back. Every rank calls it.

    Where `ask` raises a `HeadraceError` or an `OSError`, every rank raises that of the first rank it happens to.
    """
    return [_answer(said) for said in mesh.tell(_said(ask))]


def of_first(mesh: Mesh, ask: Callable[[], T]) -> T:
    """The same, asked of rank 0 alone."""
    said = json.dumps(_said(ask)).encode() if mesh.rank == 0 else None
    answer: T = _answer(json.loads(mesh.share(said)))
    return answer


def _said(ask: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"answer": ask()}
    except HeadraceError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        return {"errno": error.errno, "message": error.strerror or str(error), "file": str(error.filename or "")}


def _answer(said: Mapping[str, Any]) -> Any:
    if "error" in said:
        raise getattr(headrace.errors, said["error"])(said["message"])
    if "errno" in said:
        raise OSError(said["errno"], said["message"], said["file"] or None)
    return said["answer"]
