"""`CollectiveQueue`: the data group's collectives in flight, carried out in the order in which they were asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["CollectiveQueue"]


class CollectiveQueue:
    """A thread that talks to the other copies while this one computes.

    A link carries one message at a time, and all ranks must have theirs in one order: whoever asks, asks here, and
    whoever wants to use the group itself, waits for `all` first. Not overlapping, each is done when it is asked for.
    """

    def __init__(self, overlap: bool) -> None:
        self._thread = ThreadPoolExecutor(1, "collectives") if overlap else None
        self._pending: deque[Future[None]] = deque()
        self.waited = 0.0
        """Seconds for which those who ask did not go on."""

    def ask(self, work: Callable[[], None]) -> Future[None]:
        """Do `work` after what was asked for before. Its errors come up where it is waited for."""
        if self._thread is not None:
            self._pending.append(self._thread.submit(work))
            return self._pending[-1]
        done: Future[None] = Future()
        began = time.perf_counter()
        work()
        self.waited += time.perf_counter() - began
        done.set_result(None)
        return done

    def wait(self, message: Future[None]) -> None:
        """Wait until a message has gone."""
        began = time.perf_counter()
        message.result()
        self.waited += time.perf_counter() - began

    def leave(self, pending: int) -> None:
        """Wait until no more than `pending` are left."""
        while len(self._pending) > pending:
            self.wait(self._pending.popleft())

    def all(self) -> None:
        """Wait for all."""
        self.leave(0)

    def close(self) -> None:
        """Wait for what is being done, and end the thread; what was not begun is dropped."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
