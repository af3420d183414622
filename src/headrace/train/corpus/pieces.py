"""`DocumentPiece`: at most `seq_length` tokens of a document, a sequence of a batch; and streams of pieces.

A document of n tokens has n - 1 predictions. A piece covers up to `seq_length` of them: its inputs, and one more
token, the last target. So neighbouring pieces share a token, and every prediction belongs to exactly one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from headrace.config import require

__all__ = ["DAMAGED", "DocumentPiece", "Held", "PieceStream", "cut", "same_data"]

DAMAGED = "the snapshot's data state is damaged: delete that snapshot, and resume from the one before"


@dataclass(frozen=True, slots=True)
class DocumentPiece:
    """One sequence of a batch; attention does not cross its ends."""

    ids: np.ndarray
    """int64 [length + 1]: the inputs, and the target of the last."""
    counts: np.ndarray
    """bool [length + 1]: whether each token counts in the loss as a target."""

    @property
    def length(self) -> int:
        """The number of inputs."""
        return len(self.ids) - 1


class PieceStream(Protocol):
    """An iterator of pieces, each with at least one token that counts, that can be saved and continued."""

    def peek(self) -> DocumentPiece | None:
        """The next piece; None at the end, if there is one."""

    def advance(self) -> None:
        """Move to the next piece."""

    def state(self) -> dict[str, Any]:
        """The position of the next piece, in JSON values."""


def cut(ids: np.ndarray, counts: np.ndarray, seq_length: int) -> list[DocumentPiece]:
    """The pieces of one document, without those in which no token counts."""
    starts = range(0, len(ids) - 1, seq_length)
    pieces = [DocumentPiece(ids[i : i + seq_length + 1], counts[i : i + seq_length + 1]) for i in starts]
    return [piece for piece in pieces if piece.counts[1:].any()]


class Held:
    """A finite stream of the pieces in an iterator."""

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
        """The number of pieces taken."""
        return {"taken": self._taken}


def same_data(state: dict[str, Any], run: dict[str, Any], counters: tuple[str, ...]) -> list[int]:
    """The counters of a saved state, if it belongs to the data and settings of this run.

    Raises `ConfigError` that names the setting in which they differ.
    """
    require(
        isinstance(state, dict) and set(state) == {*run, *counters},
        DAMAGED,
    )
    for name, value in run.items():
        require(
            state[name] == value,
            f"the snapshot's data had {name}={state[name]!r}, this run has {value!r}: "
            "resume with the data and settings that it was started with",
        )
    values = [state[name] for name in counters]
    require(
        all(isinstance(value, int) and value >= 0 for value in values),
        DAMAGED,
    )
    return values
