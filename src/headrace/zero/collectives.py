"""`CollectiveQueue`: runs the data-parallel group's collectives in order, beside the computation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["CollectiveQueue"]


class CollectiveQueue:
    """A thread that runs collectives with the other copies while this rank computes.

    A link carries one message at a time, and all ranks must run their collectives in one order: submit all of them
    here, and `drain` before using the group directly. Without `overlap`, `submit` runs the work at once.
    """

    def __init__(self, overlap: bool) -> None:
        self._thread = ThreadPoolExecutor(1, "collectives") if overlap else None
        self._pending: deque[Future[None]] = deque()
        self.waited = 0.0
        """Seconds that callers spent waiting."""

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Run `work` after all earlier work. `wait` raises its errors."""
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
        """Wait for one piece of work; raises its error."""
        began = time.perf_counter()
        message.result()
        self.waited += time.perf_counter() - began

    def wait_until(self, pending: int) -> None:
        """Wait until at most `pending` are left."""
        while len(self._pending) > pending:
            self.wait(self._pending.popleft())

    def drain(self) -> None:
        self.wait_until(0)

    def close(self) -> None:
        """End the thread after the running work; work that has not begun is dropped."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
