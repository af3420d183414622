"""`EngineLoop`: commands from any thread, obeyed between the steps of the one thread that owns the engine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

__all__ = ["EngineLoop", "EngineStoppedError"]


class EngineStoppedError(RuntimeError):
    """The engine was shut down, or its thread failed: this request will bring nothing more."""


class EngineLoop:
    """Obeys commands in their order, then steps while there is work; asleep while there is neither."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._cause: BaseException | None = None

    def post(self, command: Callable[[], None]) -> None:
        """Have the owner's thread call `command` before its next step; `EngineStoppedError` after `close`."""
        with self._closing:
            if self._closed:
                raise EngineStoppedError("the engine has been shut down") from self._cause
            self._commands.put(command)

    def stop(self) -> None:
        """Let `run` return after the step that runs. May be called again, and at any time."""
        self._commands.put(None)

    def run(self, busy: Callable[[], bool], step: Callable[[], None]) -> None:
        """Until `stop`: the commands, then one `step`; waits for a command where `busy()` is false."""
        while self._obey(wait=not busy()):
            step()

    def close(self, cause: BaseException | None = None) -> None:
        """Take no more commands, and obey the last ones: every command that `post` took is called once."""
        with self._closing:
            self._closed, self._cause = True, cause
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()

    def _obey(self, wait: bool) -> bool:
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False
