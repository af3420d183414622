"""Pieces: what a sequence of a batch is cut from, and who hands them out in order.

A document of n tokens has n - 1 predictions. A piece covers up to `seq_length` of them: its inputs and, one token
further, the last one's target. So pieces share one token, and every prediction belongs to exactly one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from headrace.config import require

__all__ = ["DocumentPiece", "Held", "PieceStream", "cut", "same_data"]


@dataclass(frozen=True, slots=True)
class DocumentPiece:
    """A sequence of its own in a batch: attention begins and ends with it."""

    ids: np.ndarray
    """int64 [length + 1]: the inputs, and the target of the last."""
    counts: np.ndarray
    """bool [length + 1]: whether each token counts in the loss when it is the one to predict."""

    @property
    def length(self) -> int:
        """How many inputs."""
        return len(self.ids) - 1


class PieceStream(Protocol):
    """Pieces one after another, each with at least one token that counts."""

    def peek(self) -> DocumentPiece | None:
        """The next piece; None at the end, if there is one."""

    def advance(self) -> None:
        """Go past it."""

    def state(self) -> dict[str, Any]:
        """Where the next piece is, in plain JSON values."""


def cut(ids: np.ndarray, counts: np.ndarray, seq_length: int) -> list[DocumentPiece]:
    """The pieces of one document, those in which nothing counts left out."""
    starts = range(0, len(ids) - 1, seq_length)
    pieces = [DocumentPiece(ids[i : i + seq_length + 1], counts[i : i + seq_length + 1]) for i in starts]
    return [piece for piece in pieces if piece.counts[1:].any()]


class Held:
    """The pieces of an iterator, with an end."""

    def __init__(self, pieces: Iterator[DocumentPiece]) -> None:
        self._pieces = pieces
        self._next = next(pieces, None)
        self._taken = 0

    def peek(self) -> DocumentPiece | None:
        """The next piece; None at the end."""
        return self._next

    def advance(self) -> None:
        """Go past it."""
        self._next = next(self._pieces, None)
        self._taken += 1

    def state(self) -> dict[str, Any]:
        """How many were taken."""
        return {"taken": self._taken}


def same_data(state: dict[str, Any], run: dict[str, Any], counters: tuple[str, ...]) -> list[int]:
    """The counters of a saved state, if it belongs to the data and settings of this run.

    Raises `ConfigError` that names the setting in which they differ.
    """
    require(isinstance(state, dict) and set(state) == {*run, *counters}, "the snapshot's data state is damaged")
    for name, value in run.items():
        require(
            state[name] == value,
            f"the snapshot's data had {name}={state[name]!r}, this run has {value!r}: "
            "resume with the data and settings that it was started with",
        )
    values = [state[name] for name in counters]
    require(all(isinstance(value, int) and value >= 0 for value in values), "the snapshot's data state is damaged")
    return values
