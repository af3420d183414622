"""`StepTimer`: how long each step took, with one or two in flight, and without the draft model's passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["StepTimer"]

_GAP = 0.25
"""Of a step's time: the host was idle for what is longer than that."""


class _Begun(NamedTuple):
    """A step in flight: its rows, when its planning began, and the seconds of the draft model's passes in it."""

    rows: int
    start: float
    passes: float


class StepTimer:
    """Told when a step is planned, begun and ended. Ends come in the order of beginnings; a step may be given up."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begun: deque[_Begun] = deque()
        self._planned: float | None = None
        self._passes = 0.0
        self._ended = float("-inf")

    def planned(self) -> None:
        """The planning of a step begins."""
        self._planned = self._clock()

    def passed(self, seconds: float) -> None:
        """A pass of the draft model, for the step being planned, took so long."""
        self._passes += seconds

    def began(self, rows: int) -> None:
        """The step being planned goes to the executor."""
        self._begun.append(_Begun(rows, self._clock() if self._planned is None else self._planned, self._passes))
        self._planned, self._passes = None, 0.0

    def ended(self, rows: int, usual: float) -> float | None:
        """Seconds of the oldest step of so many rows, which has its result; None if it never began.

        They begin where the step before ended: what the host does between steps is more with more rows, too. Only a
        gap that is long for a step of `usual` seconds does not count.
        """
        now, before = self._clock(), self._ended
        self._ended = now
        while self._begun and self._begun[0].rows != rows:  # steps that were given up
            self._begun.popleft()
        if not self._begun:
            return None
        _, start, passes = self._begun.popleft()
        if before > start:  # its passes ran while the step before did
            return now - before
        return now - (before if start - before < _GAP * usual else start) - passes
