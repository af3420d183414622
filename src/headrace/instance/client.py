"""`InstanceClient`: starts an instance's process, sends it commands, yields its events, and detects its exit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from headrace.errors import HeadraceError
from headrace.instance.wire import (
    COMMANDS,
    EVENTS,
    Command,
    Event,
    EventBatch,
    Failed,
    InstalledWeights,
    KernelProgress,
    Ready,
    Stop,
    decode_event,
    encode,
)

__all__ = ["InstanceClient", "InstanceDiedError"]

_EXITED = b""
"""Sent to the client's own socket when the process has exited."""


class InstanceDiedError(RuntimeError):
    """The process exited or failed, and the user's input is not the cause."""


class InstanceClient:
    """One instance process, from `start` to its exit; a restart makes a new client.

    It belongs to one event loop. The process writes to this process's standard error.
    """

    ready: Ready

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Called by `start`."""
        self._process = process
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-"))
        self._context = zmq.Context()
        self._events = zmq.asyncio.Socket(self._context, zmq.PULL)
        self._events.bind(f"ipc://{self._folder / EVENTS}")
        self._events.bind("inproc://exit")
        self._commands = self._context.socket(zmq.PUSH)
        self._commands.setsockopt(zmq.SNDHWM, 0)
        self._commands.setsockopt(zmq.LINGER, 0)
        self._watch = asyncio.create_task(self._wait())
        self._killing: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        name: str,
        model: str,
        options: dict[str, Any],
        progress: Callable[[int, int, str], None] | None = None,
        weights: InstalledWeights | None = None,
    ) -> InstanceClient:
        """Spawn a process; return when its model is loaded and its kernels are compiled.

        `name` is the instance's; `options` are fields of `EngineOptions`, JSON values; `weights` replace the model's
        own. Raises `HeadraceError` for bad input (the model, the options, the weights) and `InstanceDiedError` if the
        process exits for another reason.
        """
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "headrace.instance", stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        client = cls(process)
        try:
            start = {
                "name": name,
                "model": model,
                "options": options,
                "folder": str(client._folder),
                "began": began,
                "weights": None if weights is None else msgspec.to_builtins(weights),
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps(start).encode() + b"\n")
            await client._until_ready(progress)
        except BaseException:
            await client.kill()
            raise
        return client

    async def _until_ready(self, progress: Callable[[int, int, str], None] | None) -> None:
        async for event in self._receive():
            if isinstance(event, Ready):
                self.ready = event
                self._commands.connect(f"ipc://{self._folder / COMMANDS}")
                return
            if isinstance(event, Failed):
                raise HeadraceError(event.message) if event.bad_input else InstanceDiedError(event.message)
            if isinstance(event, KernelProgress) and progress is not None:
                progress(event.done, event.total, event.what)
        raise InstanceDiedError(f"the engine's process ended with status {self._process.returncode} while it started")

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, command: Command) -> None:
        """Queue a command without blocking; dropped if the process has exited.

        Raises UnicodeError or OverflowError where the command cannot be encoded.
        """
        data = encode(command)
        if self._killing is None:
            self._commands.send(data, zmq.NOBLOCK)

    async def batches(self) -> AsyncIterator[EventBatch]:
        """Events as they come, until the process exits; raises InstanceDiedError if it sent a reason."""
        async for event in self._receive():
            if isinstance(event, EventBatch):
                yield event
            elif isinstance(event, Failed):
                raise InstanceDiedError(event.message)

    async def stop(self, timeout: float = 5.0) -> None:
        """Stop the process after its current step; kill it after `timeout` seconds."""
        self.send(Stop())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._watch), timeout)
        await self.kill()

    async def kill(self) -> None:
        """Kill the process and free its sockets and folder. May be called again."""
        if self._killing is None:
            self._killing = asyncio.create_task(self._kill())
        await asyncio.shield(self._killing)

    async def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await self._watch
        finally:  # this task is cancelled here when the event loop closes
            self._commands.close()
            self._events.close(linger=0)
            self._context.term()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _wait(self) -> None:
        await self._process.wait()
        with self._context.socket(zmq.PUSH) as bell:
            bell.connect("inproc://exit")
            bell.send(_EXITED)

    async def _receive(self) -> AsyncIterator[Event]:
        while True:
            data = await self._events.recv()
            if data == _EXITED:
                return
            yield decode_event(data)
