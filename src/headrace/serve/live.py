"""`Live`: the picture of an engine for those who watch, a few frames a second, however many steps it does.

    gateway.reports() ──> the last steps ─┐
    gateway.inspect() ──> the radix tree ─┴──> frames(), one generator a watcher, each at its own pace

Nothing is collected while nobody watches, and all watchers share what is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from headrace.serve.errors import UnavailableError
from headrace.serve.gateway import Gateway

__all__ = ["Live"]

STEPS = 120
"""Steps that are shown."""
NODES = 400
"""Blocks of the radix tree that are shown."""
FRAME, TREE, IDLE = 0.15, 0.5, 1.0
"""Seconds: between frames, between looks at the tree, and between frames in which nothing happened."""
ENDED = ("draining", "stopped")
STATS = (
    "num_running",
    "num_waiting",
    "kv_usage",
    "physical_blocks",
    "cached_blocks",
    "generated_tokens",
    "prompt_tokens",
    "prefix_queries",
    "prefix_hits",
    "preemptions",
    "steps",
    "held_slots",
    "used_slots",
)


class Live:
    """Watches a gateway on its event loop while someone watches it."""

    def __init__(self, gateway: Gateway, model_name: str) -> None:
        self._gateway = gateway
        self._model_name = model_name
        self.watchers = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._steps: deque[tuple[int, int, float, int]] = deque(maxlen=STEPS)
        self._count = 0
        """Steps seen, of which the last are in `_steps`."""
        self._tree: dict[str, Any] | None = None
        self._looks = 0
        self._reports = 0
        self._changed = asyncio.Event()

    async def frames(self) -> AsyncIterator[dict[str, Any]]:
        """What changed since the frame before, from all that is known on. Ends when the gateway does."""
        self._enter()
        try:
            count, looks = self._count - len(self._steps), -1
            first = {"info": self._info()}
            while True:
                changed = self._changed
                frame = first | self._frame(count)
                if looks != self._looks and self._tree is not None:
                    frame["tree"] = self._tree
                count, looks, first = self._count, self._looks, {}
                yield frame
                if frame["state"] in ENDED:
                    return
                await asyncio.sleep(FRAME)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), IDLE)
        finally:
            await self._leave()

    def _info(self) -> dict[str, Any]:
        info = self._gateway.info
        return {
            "model": self._model_name,
            "block_size": info.block_size,
            "kv_blocks": info.kv_blocks,
            "max_model_len": info.max_model_len,
            "fingerprint": info.fingerprint,
            "default_sampling_params": info.default_sampling_params,
        }

    def _frame(self, seen: int) -> dict[str, Any]:
        report = self._gateway.report
        stats = {} if report is None else report.stats
        new = min(self._count - seen, len(self._steps))
        return {
            "state": self._gateway.state,
            "restarts": self._gateway.restarts,
            "time": asyncio.get_running_loop().time(),
            "stats": {name: stats.get(name, 0) for name in STATS},
            "count": self._count,
            "steps": list(self._steps)[len(self._steps) - new :],
        }

    # ---- while someone watches

    def _enter(self) -> None:
        self.watchers += 1
        if self.watchers == 1:
            self._steps.clear()  # what was seen long ago is not how it is
            self._tree = None
            self._tasks = [asyncio.create_task(self._collect()), asyncio.create_task(self._look())]

    async def _leave(self) -> None:
        self.watchers -= 1
        if self.watchers == 0:
            tasks, self._tasks = self._tasks, []
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _notify(self) -> None:
        """Wake those who wait; those who come later wait for what comes later."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _collect(self) -> None:
        async for report in self._gateway.reports():
            if report.prefill_tokens or report.decode_tokens:
                milliseconds = round(report.step_time * 1e3, 2)
                self._steps.append(
                    (report.prefill_tokens, report.decode_tokens, milliseconds, report.stats["num_running"])
                )
            self._count += bool(report.prefill_tokens or report.decode_tokens)
            self._reports += 1
            self._notify()
        self._notify()

    async def _look(self) -> None:
        """The tree as it is, now and after each report, which need not be of a step: blocks are freed without one."""
        while True:
            seen = self._reports
            with contextlib.suppress(UnavailableError):
                tree = await self._gateway.inspect(NODES)
                self._tree = {"nodes": tree.nodes, "complete": tree.complete}
                self._looks += 1
                self._notify()
            await asyncio.sleep(TREE)
            if seen == self._reports:
                await self._changed.wait()
