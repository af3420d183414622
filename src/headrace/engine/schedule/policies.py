"""Scheduling policies, which say what request is served first: one small class each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Protocol

from headrace.engine.schedule.request import Request, Status

__all__ = ["POLICIES", "FirstCome", "LongestPrefix", "Policy", "Priority"]

WINDOW = 128
"""Waiting requests looked at in one step, beyond the free seats."""


class Policy(Protocol):
    """An order over requests. Running ones are served, and in reverse preempted, by `key`."""

    preempts: bool
    """Whether a waiting request may preempt a running one that it precedes."""

    def key(self, request: Request) -> tuple[int, ...]:
        """Fixed rank of a request; lower is served first."""
        ...

    def order(self, waiting: Sequence[Request], seats: int, cached: Callable[[Request], int]) -> list[Request]:
        """Waiting requests (given sorted by `key`) in the order to admit them; `cached` counts hit tokens."""
        ...

    def overtaken(self, waiting: Sequence[Request], newest: int) -> Sequence[Request]:
        """The waiting requests that a step passed over; `newest` is the latest arrival that it seated."""
        ...


class FirstCome:
    """First come, first served."""

    preempts = False

    def key(self, request: Request) -> tuple[int, ...]:
        return (request.arrival,)

    def order(self, waiting: Sequence[Request], seats: int, cached: Callable[[Request], int]) -> list[Request]:
        return list(waiting[: WINDOW + seats])

    def overtaken(self, waiting: Sequence[Request], newest: int) -> Sequence[Request]:
        return ()


class LongestPrefix(FirstCome):
    """Longest cached prefix first (SGLang §3), among the first `WINDOW` that wait.

    A request overtaken in `patience` steps goes before all others, and so does a preempted one, which has been
    admitted before.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def order(self, waiting: Sequence[Request], seats: int, cached: Callable[[Request], int]) -> list[Request]:
        def rank(request: Request) -> tuple[int, int]:
            if request.status is Status.PREEMPTED or request.overtaken >= self.patience:
                return (0, request.arrival)
            return (1, -cached(request))  # the sort is stable: ties in order of arrival

        return sorted(waiting[: WINDOW + seats], key=rank)

    def overtaken(self, waiting: Sequence[Request], newest: int) -> Sequence[Request]:
        return list(takewhile(lambda request: request.arrival < newest, waiting))


class Priority(FirstCome):
    """Lower `priority` first, then arrival; a running request of a higher number may be preempted."""

    preempts = True

    def key(self, request: Request) -> tuple[int, ...]:
        return (request.priority, request.arrival)


POLICIES: dict[str, Callable[[int], Policy]] = {
    "fcfs": lambda patience: FirstCome(),
    "lpm": LongestPrefix,
    "priority": lambda patience: Priority(),
}
"""The scheduling policies by name: made of the steps for which a waiting request may be overtaken."""
