"""`Stream`, the deltas of one request, and `ReportFeed`, the reports of steps."""

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
    """A wake-up for one reader. `wake` without a sleeper has no effect: check the condition before `sleep`."""

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

    Unread deltas are kept; together they are at most the request's output. If the instance fails for good, reading
    raises `UnavailableError` after the deltas that came.
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
        """Time of the latest token, by the monotonic clock."""
        self.resumes = 0
        self._abort = abort
        self._wake = _Wake()
        self._pending: deque[Delta] = deque()
        self._whole = False
        self._error: Exception | None = None

    @property
    def name(self) -> str:
        """The request's name, as given to `Gateway.open`."""
        return self.transcript.output.request_id

    @property
    def output(self) -> RequestOutput:
        """The output so far: always the same object. It grows with each delta, read or not."""
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
        """The finished output. Deltas are not kept, and do not wake this coroutine."""
        self._whole = True
        self._pending.clear()
        while not self.output.finished:
            if self._error is not None:
                raise self._error
            await self._wake.sleep()
        return self.output

    async def close(self) -> None:
        """Abort the request if it runs: its blocks are freed before the engine's next step. May be called again."""
        self.abandon()

    def abandon(self) -> None:
        """`close`, for callers that cannot await."""
        if not self.output.finished and self._error is None:
            self._abort(self)

    # For the gateway.

    async def until_accepted(self) -> None:
        """Wait until the instance has accepted the request; raises its refusal."""
        while not self.accepted:
            if self._error is not None:
                raise self._error
            await self._wake.sleep()

    def accept(self) -> None:
        """The instance has accepted the request."""
        self.accepted = True
        self._wake.wake()

    def take(self, delta: Delta) -> None:
        """Add a delta to the output."""
        self.transcript.take(delta)
        if delta.finished:
            self.explanation = delta.explanation
        if not self._whole:
            self._pending.append(delta)
        if not self._whole or delta.finished:
            self._wake.wake()

    def fail(self, error: Exception) -> None:
        """End with an error, which readers get after the deltas that came."""
        self._error = error
        self._wake.wake()

    def end(self) -> None:
        """End after an abort."""
        self.transcript.end("abort")
        self._wake.wake()


class ReportFeed(AsyncIterator[StepReport]):
    """Step reports as they come. A slow reader loses the oldest ones and delays no other."""

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
        """Add a report."""
        self._reports.append(report)
        self._wake.wake()

    def close(self) -> None:
        """End the feed after the reports that it holds."""
        self._closed = True
        self._wake.wake()
