"""`EngineLoop`: runs commands from any thread between steps, on the thread that owns the engine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

__all__ = ["EngineLoop", "EngineStoppedError"]


class EngineStoppedError(RuntimeError):
    """The engine was shut down or its thread failed: the request has no further output."""


class EngineLoop:
    """Runs commands in order, then steps while there is work; sleeps while there is neither."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._cause: BaseException | None = None

    def post(self, command: Callable[[], None]) -> None:
        """Queue `command`; the owner calls it before its next step. Raises `EngineStoppedError` after `close`."""
        with self._closing:
            if self._closed:
                raise EngineStoppedError("the engine has been shut down") from self._cause
            self._commands.put(command)

    def stop(self) -> None:
        """Let `run` return after its current step. May be called again, and before `run`."""
        self._commands.put(None)

    def run(self, busy: Callable[[], bool], step: Callable[[], None]) -> None:
        """Until `stop`: run the commands, then one `step`. Waits for a command while `busy()` is false."""
        while self._run_commands(wait=not busy()):
            step()

    def close(self, cause: BaseException | None = None) -> None:
        """Accept no more commands and run the queued ones: every command that `post` accepted is called once."""
        with self._closing:
            self._closed, self._cause = True, cause
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()

    def _run_commands(self, wait: bool) -> bool:
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False
