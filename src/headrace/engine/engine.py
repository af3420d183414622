"""`Engine`: the loop. Scheduler and runner meet here and nowhere else."""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, Protocol, TypeVar

from headrace.engine.schedule.plan import Plan, StepResult
from headrace.engine.schedule.request import RequestUpdate
from headrace.engine.schedule.scheduler import Scheduler

__all__ = ["Engine", "EngineFailedError", "Executor"]


class EngineFailedError(RuntimeError):
    """An earlier step of this engine raised: it can do no other."""


class Executor(Protocol):
    """What runs plans, in the order they are submitted: the `Runner`, or a stopwatch in its place."""

    def submit(self, plan: Plan) -> Any:
        """Start a step and return a handle without waiting for its tokens."""
        ...

    def result(self, handle: Any) -> StepResult:
        """Wait for a step's tokens."""
        ...


R = TypeVar("R", bound=Executor)


class Engine(Generic[R]):
    """Keeps `depth` plans in flight; a stop may thus come `depth - 1` steps late, and the overrun is discarded."""

    def __init__(self, scheduler: Scheduler, runner: R, depth: int = 1) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.depth = depth
        self._in_flight: deque[tuple[Plan, Any]] = deque()
        self._failure: BaseException | None = None
        self.last_plan: Plan | None = None
        """What the last step computed, for those who watch; None if it had nothing to do."""

    def step(self) -> list[RequestUpdate]:
        """Plan until `depth` steps are in flight, then wait for the oldest one and hand its tokens out.

        A step that raises, interrupts too, is the last: blocks that it planned stand in the prefix cache and were
        perhaps never computed. Every later one raises `EngineFailedError`.
        """
        if self._failure is not None:
            raise EngineFailedError(
                f"an earlier step raised {self._failure!r}, so the KV cache may be wrong: make a new engine"
            ) from self._failure
        try:
            return self._step()
        except BaseException as error:
            self._failure = error
            raise

    def _step(self) -> list[RequestUpdate]:
        while len(self._in_flight) < self.depth:
            plan = self.scheduler.schedule()
            if not plan.slices:
                break
            self._in_flight.append((plan, self.runner.submit(plan)))
        self.last_plan = None
        if not self._in_flight:
            return []
        plan, handle = self._in_flight.popleft()
        self.last_plan = plan
        return self.scheduler.update(plan, self.runner.result(handle))

    def fail(self, cause: BaseException) -> None:
        """The model can be relied on no more: every later step raises `EngineFailedError`."""
        self._failure = cause

    def drain(self) -> list[RequestUpdate]:
        """Wait for all that is in flight, and plan nothing."""
        updates: list[RequestUpdate] = []
        while self._in_flight:
            plan, handle = self._in_flight.popleft()
            updates += self.scheduler.update(plan, self.runner.result(handle))
        return updates

    @property
    def has_work(self) -> bool:
        """Whether another `step` may bring something."""
        return bool(self._in_flight) or self.scheduler.has_unfinished
