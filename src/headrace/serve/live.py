"""`Live`: an engine's state for the playground, a few frames a second, independent of the step rate.

    gateway.reports() ──> the last steps ─┐
    gateway.inspect() ──> the radix tree ─┴──> frames(), one generator a watcher, each at its own rate

Data is collected only while there are watchers, and shared by all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from headrace.serve.errors import UnavailableError
from headrace.serve.gateway import Gateway

__all__ = ["Live"]

STEPS = 120
"""Steps kept for a new watcher."""
NODES = 400
"""Blocks of the radix tree in a frame, at most."""
FRAME, TREE, IDLE = 0.15, 0.5, 1.0
"""Seconds: between frames, between reads of the tree, and between frames while idle."""
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
    """Collects a gateway's reports, on its event loop, while there are watchers."""

    def __init__(self, gateway: Gateway, model_name: str) -> None:
        self._gateway = gateway
        self._model_name = model_name
        self.watchers = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._steps: deque[tuple[int, int, float, int]] = deque(maxlen=STEPS)
        self._count = 0
        """Steps so far, of which the last are in `_steps`."""
        self._tree: dict[str, Any] | None = None
        self._tree_reads = 0
        self._reports = 0
        self._changed = asyncio.Event()

    async def frames(self) -> AsyncGenerator[dict[str, Any], None]:
        """The whole state, then what changed since the previous frame. Ends when the gateway stops."""
        self._add_watcher()
        try:
            count, tree_reads = self._count - len(self._steps), -1
            first = {"info": self._info()}
            while True:
                changed = self._changed
                frame = first | self._frame(count)
                if tree_reads != self._tree_reads and self._tree is not None:
                    frame["tree"] = self._tree
                count, tree_reads, first = self._count, self._tree_reads, {}
                yield frame
                if frame["state"] in ENDED:
                    return
                await asyncio.sleep(FRAME)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), IDLE)
        finally:
            await self._remove_watcher()

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

    # ---- while there are watchers

    def _add_watcher(self) -> None:
        self.watchers += 1
        if self.watchers == 1:
            self._steps.clear()  # outdated
            self._tree = None
            self._tasks = [asyncio.create_task(self._collect()), asyncio.create_task(self._read_tree())]

    async def _remove_watcher(self) -> None:
        self.watchers -= 1
        if self.watchers == 0:
            tasks, self._tasks = self._tasks, []
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _notify(self) -> None:
        """Wake the generators that wait; later waits need a later change."""
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

    async def _read_tree(self) -> None:
        """Read the tree now and after every report. Reports also come without a step: an abort frees blocks."""
        while True:
            seen = self._reports
            with contextlib.suppress(UnavailableError):
                tree = await self._gateway.inspect(NODES)
                self._tree = {"nodes": tree.nodes, "complete": tree.complete}
                self._tree_reads += 1
                self._notify()
            await asyncio.sleep(TREE)
            if seen == self._reports:
                await self._changed.wait()
