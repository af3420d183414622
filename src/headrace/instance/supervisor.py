"""`InstanceSupervisor`: keeps one instance process running, and restarts it with back-off when it dies.

    starting ──> ready ──(the process dies)──> restarting ──> ready
        └──────────┴──> stopped                    └──> failed

What becomes of the requests that ran in a process is up to the supervisor's owner.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from headrace.errors import HeadraceError
from headrace.instance.client import InstanceClient, InstanceDiedError
from headrace.instance.wire import (
    Command,
    Delta,
    Embedding,
    EventBatch,
    InstalledWeights,
    Ready,
    StepReport,
    WeightsUpdated,
    encode,
)

__all__ = ["Death", "InstanceOwner", "InstanceState", "InstanceSupervisor"]

GIVE_UP_AFTER = 6
"""Deaths in a row without progress after which no other process is started."""
BACKOFF, LONG_LIFE = 0.2, 60.0
"""Seconds: the base of the wait before a restart; the age from which a process that served nothing was only idle."""

InstanceState = Literal["starting", "ready", "restarting", "failed", "stopped"]


@dataclass(frozen=True)
class Death:
    """The unexpected end of a process."""

    reason: str
    in_a_row: int
    """Processes without progress that have ended since the last progress, this one included."""
    restarting: bool
    """Whether another one is started; if not, `on_failure` follows."""


class InstanceOwner(Protocol):
    """Callbacks of a supervisor, on the event loop. `name` is the instance's."""

    def on_events(self, name: str, batch: EventBatch) -> None:
        """Events of the running process."""

    def on_death(self, name: str, death: Death) -> None:
        """The process ended, or its successor did before it was ready."""

    def on_restart(self, name: str, before: Ready) -> None:
        """A new process is ready, without any request. `before` describes the previous one."""

    def on_failure(self, name: str, reason: str) -> None:
        """No other process will be started."""


class InstanceSupervisor:
    """One instance: a process and its successors."""

    ready: Ready
    """Of the newest process."""

    def __init__(
        self,
        name: str,
        model: str,
        options: dict[str, Any],
        owner: InstanceOwner,
        *,
        restart: bool = True,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        """`options` are fields of `EngineOptions`; `progress(done, total, kernel)` is called while kernels compile."""
        self.name = name
        self.state: InstanceState = "starting"
        self.restarts = 0
        self.report: StepReport | None = None
        """The latest step's."""
        self.weights: InstalledWeights | None = None
        """Installed last, over the model's own: a new process gets them too."""
        self._owner = owner
        self._restart = restart
        self._spawn: Callable[[], Awaitable[InstanceClient]] = lambda: InstanceClient.start(
            name, model, options, progress, self.weights
        )
        self._client: InstanceClient | None = None
        self._task: asyncio.Task[None] | None = None
        self._deaths = 0
        """In a row, without progress."""

    @property
    def weights_version(self) -> int:
        """Of the weights that the process has."""
        return self.ready.weights_version if self.weights is None else self.weights.version

    async def start(self) -> None:
        """Return when the model is loaded. `HeadraceError`: the user's mistake; `InstanceDiedError`: anything else."""
        try:
            self._take_over(await self._spawn())
        except BaseException:
            self.state = "failed"
            raise
        self._task = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the process after its step. No callback comes afterwards. May be called again."""
        self.state = "stopped"
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        client, self._client = self._client, None
        if client is not None:
            await client.stop()

    def send(self, command: Command) -> None:
        """Send a command if the process is ready, else only check it: the owner sends again in `on_restart`.

        Raises UnicodeError or OverflowError where the command cannot be encoded.
        """
        if self.state == "ready" and self._client is not None:
            self._client.send(command)
        else:
            encode(command)

    # ---- one process after another

    async def _supervise(self) -> None:
        """Pass on events; restart the process when it dies. Returns when no other is started."""
        try:
            while self._client is not None:
                began = time.monotonic()
                reason = await self._listen(self._client)
                await self._client.kill()
                self._client = None
                self._note_death(reason, time.monotonic() - began)
                while self.state == "restarting":
                    await self._start_another()
        except Exception as error:
            self._give_up(f"the gateway failed: {error!r}")
            raise

    async def _listen(self, client: InstanceClient) -> str:
        """Pass on a process's events until it ends; returns the reason."""
        try:
            async for batch in client.batches():
                self._note_events(batch)
                self._owner.on_events(self.name, batch)
                await asyncio.sleep(0)  # messages that are there already would keep every other task from running
        except InstanceDiedError as error:
            return f"the engine failed: {error}"
        return "the engine's process died"

    def _note_events(self, batch: EventBatch) -> None:
        for event in batch.events:
            if isinstance(event, (Delta, Embedding, WeightsUpdated)):
                self._deaths = 0
            if isinstance(event, WeightsUpdated):
                self.weights = event.weights
            elif isinstance(event, StepReport):
                self.report = event

    async def _start_another(self) -> None:
        if self._deaths > 1:
            await asyncio.sleep(BACKOFF * 2**self._deaths)
        began = time.monotonic()
        try:
            client = await self._spawn()
        except HeadraceError as error:
            self._give_up(f"the engine cannot start again: {error}")
        except (InstanceDiedError, OSError) as error:
            self._note_death(str(error), time.monotonic() - began)
        else:
            before = self.ready
            self._take_over(client)
            self.restarts += 1
            self._owner.on_restart(self.name, before)

    def _take_over(self, client: InstanceClient) -> None:
        self._client, self.ready, self.state = client, client.ready, "ready"

    def _note_death(self, reason: str, lived: float) -> None:
        self._deaths = 0 if lived > LONG_LIFE else self._deaths + 1
        restarting = self._restart and self._deaths < GIVE_UP_AFTER
        self.state = "restarting" if restarting else "failed"
        if restarting:
            print(f"headrace: {reason}; starting another", file=sys.stderr)
        self._owner.on_death(self.name, Death(reason, self._deaths, restarting))
        if not restarting:
            self._give_up(f"{reason}, {self._deaths} times in a row" if self._restart else reason)

    def _give_up(self, reason: str) -> None:
        print(f"headrace: {reason}; no other is started", file=sys.stderr)
        self.state = "failed"
        self._owner.on_failure(self.name, reason)
