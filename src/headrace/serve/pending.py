"""`PendingCommands`: commands that an instance answers once, and the futures of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Generic, TypeVar

__all__ = ["PendingCommands"]

C = TypeVar("C")
T = TypeVar("T")


class PendingCommands(Generic[C, T]):
    """Commands of one kind by name, in the order in which they were added, each with its instance and its future."""

    def __init__(self) -> None:
        self._pending: dict[str, tuple[str, C, asyncio.Future[T]]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def of_instance(self, instance: str) -> Sequence[C]:
        """The commands that one instance has not answered."""
        return [command for at, command, _ in self._pending.values() if at == instance]

    def add(self, name: str, instance: str, command: C) -> asyncio.Future[T]:
        """The future of the answer."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._pending[name] = instance, command, future
        return future

    def discard(self, name: str) -> bool:
        """Forget a command; whether it was still without an answer."""
        return self._pending.pop(name, None) is not None

    def resolve(self, name: str, answer: T) -> None:
        """Set a command's answer. Without effect if the command was discarded."""
        _, _, future = self._pending.pop(name, (None, None, None))
        if future is not None and not future.done():
            future.set_result(answer)

    def fail(self, name: str, error: Exception) -> None:
        """Set an error in place of an answer. Without effect if the command was discarded."""
        _, _, future = self._pending.pop(name, (None, None, None))
        if future is not None and not future.done():
            future.set_exception(error)

    def fail_instance(self, instance: str, error: Exception) -> None:
        """Fail every command of one instance."""
        for name in [name for name, (at, _, _) in self._pending.items() if at == instance]:
            self.fail(name, error)
