"""`Ranks`: the other ranks of a model, in processes that rank 0 starts and watches (tensor parallelism in serving).

Rank 0 writes one frame a step to each process's pipe; the model's sums go through the process group.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headrace.engine.run.frames import frame
from headrace.errors import ConfigError, HeadraceError
from headrace.parallel.group import RankGroup
from headrace.parallel.rendezvous import connect, keep_store

__all__ = ["RankDiedError", "Ranks"]


class RankDiedError(RuntimeError):
    """A rank's process ended, or failed, for a reason that is not the user's input."""


class Ranks:
    """The processes of ranks 1 … size − 1. With size 1 every method is a no-op."""

    def __init__(self, size: int = 1, timeout: float = math.inf) -> None:
        self.size = size
        self._timeout = timeout
        self.group: RankGroup = RankGroup()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._store: Any = None
        self._closing = False

    @classmethod
    def start(
        cls,
        size: int,
        folder: Path,
        kernels: str,
        options: list[dict[str, Any]],
        dtype: str,
        device: torch.device,
        timeout: float,
    ) -> Ranks:
        """Start the other ranks and connect to them. `options[i]` are the options of rank i's ops.

        `timeout` (seconds) bounds a rank's start, its loading and each exchange. Raises `ConfigError` naming a rank
        that is late, `RankDiedError` for one whose process ends.
        """
        ranks = cls(size, timeout)
        if size == 1:
            return ranks
        try:
            ranks._store = keep_store(size, timeout)
            for rank in range(1, size):
                ranks._spawn(
                    {
                        "rank": rank,
                        "size": size,
                        "port": ranks._store.port,
                        "folder": str(folder),
                        "kernels": kernels,
                        "options": options[rank],
                        "dtype": dtype,
                        "timeout": timeout,
                        "threads": options[rank].get("threads"),
                    }
                )
            ranks._wait_for("started")
            ranks.group = connect(ranks._store, 0, size, device, timeout)
        except BaseException:
            ranks.close()
            raise
        return ranks

    def initialize_cache(self, **values: Any) -> None:
        """Have every rank allocate its part of the KV cache, and wait until all are ready."""
        if self._processes:
            self.send(frame("cache", values))
            self._wait_for("ready")

    def send(self, message: bytes) -> None:
        """Send one frame to every rank."""
        for rank, process in enumerate(self._processes, 1):
            assert process.stdin is not None
            try:
                process.stdin.write(message)
                process.stdin.flush()
            except (BrokenPipeError, ValueError):
                raise RankDiedError(self._exit_message(rank)) from None

    def explain(self, error: RuntimeError) -> RuntimeError:
        """The exception for a collective that raised `error`: `RankDiedError` where a rank's process has ended."""
        for rank, process in enumerate(self._processes, 1):
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                continue
            return RankDiedError(self._exit_message(rank))
        return error

    def watch(self, on_death: Callable[[str], None]) -> None:
        """Call `on_death(what happened)` from another thread when a rank ends before `close`."""
        for rank, process in enumerate(self._processes, 1):
            watcher = threading.Thread(target=self._report_exit, args=(rank, process, on_death), daemon=True)
            watcher.start()

    def close(self) -> None:
        """End the processes. May be called again."""
        self._closing = True
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
        for process in self._processes:
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []
        self.group.close()

    def _spawn(self, start: dict[str, Any]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "headrace.engine.run.rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ,
        )
        self._processes.append(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(start).encode() + b"\n")
        process.stdin.flush()

    def _wait_for(self, state: str) -> None:
        """Wait until every rank reports `state`; raises the failure that a rank reports instead."""
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes, 1):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            deadline = time.monotonic() + self._timeout
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = ", ".join(str(key.data) for key in selector.get_map().values())
                    raise ConfigError(
                        f"rank {missing} of {self.size} was not {state} within {self._timeout:g} s: "
                        "see its standard error, or raise rank_timeout"
                    )
                for key, _ in ready:
                    stdout: Any = key.fileobj
                    self._check_reply(key.data, stdout.readline(), state)
                    selector.unregister(stdout)

    def _check_reply(self, rank: int, line: bytes, state: str) -> None:
        if not line:
            self._processes[rank - 1].wait()
            raise RankDiedError(self._exit_message(rank))
        report = json.loads(line)
        if state not in report:
            kind = HeadraceError if report.get("bad_input") else RankDiedError
            raise kind(f"rank {rank} of {self.size}: {report.get('failed', report)}")

    def _report_exit(self, rank: int, process: subprocess.Popen[bytes], on_death: Callable[[str], None]) -> None:
        process.wait()
        if not self._closing:
            on_death(self._exit_message(rank))

    def _exit_message(self, rank: int) -> str:
        return f"rank {rank} of {self.size} ended with status {self._processes[rank - 1].poll()}: restart the engine"
