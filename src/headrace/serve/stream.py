"""What a gateway gives its callers: the deltas of one request, and the feed of step reports."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from headrace.instance.wire import Delta, Explanation, StepReport
from headrace.llm.outputs import RequestOutput
from headrace.serve.transcript import Transcript

__all__ = ["ReportFeed", "Stream"]


class _Wake:
    """One reader sleeps here until it is woken; a wake-up before it sleeps is not lost by a reader that looks first."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def sleep(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Stream(AsyncIterator[Delta]):
    """One request. Iterate over its deltas, or await its `result`; one reader at a time.

    Deltas that nobody has read yet are kept; they are never more than the request's output. Where the engine is
    lost for good, reading raises `UnavailableError` after the deltas that came.
    """

    def __init__(self, transcript: Transcript, instance: str, abort: Callable[[Stream], None]) -> None:
        """`instance` is the name of the one that runs it; `abort` is called when the stream is closed early."""
        self.transcript = transcript
        self.instance = instance
        self.explanation: Explanation | None = None
        """With the last delta."""
        self.accepted = False
        self.opened = time.monotonic()
        self.last_token: float | None = None
        """When the latest token came, by the monotonic clock."""
        self.resumes = 0
        self._abort = abort
        self._wake = _Wake()
        self._pending: deque[Delta] = deque()
        self._whole = False
        self._error: Exception | None = None

    @property
    def name(self) -> str:
        """The request's name, as it was opened."""
        return self.transcript.output.request_id

    @property
    def output(self) -> RequestOutput:
        """All that has come so far: the same object, which grows with each delta whether or not that was read."""
        return self.transcript.output

    async def __anext__(self) -> Delta:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self.output.finished:
                raise StopAsyncIteration
            await self._wake.sleep()
        return self._pending.popleft()

    async def result(self) -> RequestOutput:
        """The finished output. The deltas on the way wake nobody and are not kept."""
        self._whole = True
        self._pending.clear()
        while not self.output.finished:
            if self._error is not None:
                raise self._error
            await self._wake.sleep()
        return self.output

    async def close(self) -> None:
        """End the request, if it runs: its blocks are free before the engine's next step. May be called again."""
        self.abandon()

    def abandon(self) -> None:
        """`close`, where one cannot await."""
        if not self.output.finished and self._error is None:
            self._abort(self)

    # For the gateway.

    async def until_accepted(self) -> None:
        """Until the instance took the request; raises what was refused."""
        while not self.accepted:
            if self._error is not None:
                raise self._error
            await self._wake.sleep()

    def accept(self) -> None:
        """The instance took it."""
        self.accepted = True
        self._wake.wake()

    def take(self, delta: Delta) -> None:
        """Something new."""
        self.transcript.take(delta)
        if delta.finished:
            self.explanation = delta.explanation
        if not self._whole:
            self._pending.append(delta)
        if not self._whole or delta.finished:
            self._wake.wake()

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        self._error = error
        self._wake.wake()

    def end(self) -> None:
        """Its client has left."""
        self.transcript.end("abort")
        self._wake.wake()


class ReportFeed(AsyncIterator[StepReport]):
    """Step reports as they come. A slow reader misses the oldest ones; nobody waits for it."""

    def __init__(self, size: int = 64) -> None:
        self._reports: deque[StepReport] = deque(maxlen=size)
        self._wake = _Wake()
        self._closed = False

    async def __anext__(self) -> StepReport:
        while not self._reports:
            if self._closed:
                raise StopAsyncIteration
            await self._wake.sleep()
        return self._reports.popleft()

    def push(self, report: StepReport) -> None:
        """A new report."""
        self._reports.append(report)
        self._wake.wake()

    def close(self) -> None:
        """The reader gets what is left, then the end."""
        self._closed = True
        self._wake.wake()
