"""`Questions`: what an instance was asked that it answers once, and who waits for the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Generic, TypeVar

__all__ = ["Questions"]

C = TypeVar("C")
T = TypeVar("T")


class Questions(Generic[C, T]):
    """Commands of one kind by name, in the order in which they were asked, each with its answer to come."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[C, asyncio.Future[T]]] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def commands(self) -> Sequence[C]:
        """Those without an answer."""
        return [command for command, _ in self._open.values()]

    @property
    def oldest(self) -> str:
        """The name of the first that has no answer."""
        return next(iter(self._open))

    def ask(self, name: str, command: C) -> asyncio.Future[T]:
        """The answer to come."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._open[name] = command, answer
        return answer

    def withdraw(self, name: str) -> bool:
        """Nobody waits any more; whether it was without an answer."""
        return self._open.pop(name, None) is not None

    def answer(self, name: str, value: T) -> None:
        """Give an answer to whoever still waits for it."""
        _, answer = self._open.pop(name, (None, None))
        if answer is not None and not answer.done():
            answer.set_result(value)

    def fail(self, name: str, error: Exception) -> None:
        """The same with an error."""
        _, answer = self._open.pop(name, (None, None))
        if answer is not None and not answer.done():
            answer.set_exception(error)

    def fail_all(self, error: Exception) -> None:
        """None of them will be answered."""
        for name in list(self._open):
            self.fail(name, error)
