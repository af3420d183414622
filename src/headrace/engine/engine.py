"""`Engine`: the loop that runs the scheduler's plans on an executor."""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, Protocol, TypeVar

from headrace.engine.schedule.plan import Plan, StepResult
from headrace.engine.schedule.request import RequestUpdate
from headrace.engine.schedule.scheduler import Scheduler

__all__ = ["Engine", "EngineFailedError", "Executor"]


class EngineFailedError(RuntimeError):
    """An earlier step of this engine raised an exception, so it can run no further step."""


class Executor(Protocol):
    """Runs plans in the order they are submitted: `Runner`, or `NullRunner` without a model."""

    def submit(self, plan: Plan) -> Any:
        """Start a step and return a handle without waiting for its tokens."""
        ...

    def result(self, handle: Any) -> StepResult:
        """Wait for a step's tokens."""
        ...


R = TypeVar("R", bound=Executor)


class Engine(Generic[R]):
    """Keeps up to `depth` plans in flight. A stop may come `depth - 1` steps late; tokens past it are discarded."""

    def __init__(self, scheduler: Scheduler, runner: R, depth: int = 1) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.depth = depth
        self._in_flight: deque[tuple[Plan, Any]] = deque()
        self._failure: BaseException | None = None
        self.last_plan: Plan | None = None
        """The plan whose result the last step returned; None if there was none."""

    def step(self) -> list[RequestUpdate]:
        """Plan until `depth` steps are in flight, then wait for the oldest one and return its updates.

        After a step that raises (`KeyboardInterrupt` included) every later one raises `EngineFailedError`: the prefix
        cache may hold blocks that were planned and never computed.
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
        """Make every later step raise `EngineFailedError` from `cause`."""
        self._failure = cause

    def drain(self) -> list[RequestUpdate]:
        """Wait for every step in flight, without planning another one; returns their updates."""
        updates: list[RequestUpdate] = []
        while self._in_flight:
            plan, handle = self._in_flight.popleft()
            updates += self.scheduler.update(plan, self.runner.result(handle))
        return updates

    @property
    def has_work(self) -> bool:
        """Whether a further `step` can compute or return anything."""
        return bool(self._in_flight) or self.scheduler.has_unfinished
