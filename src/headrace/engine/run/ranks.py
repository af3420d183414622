"""`Ranks`: rank 0's hold on the other ranks of a model, processes of its own (tensor parallelism in serving).

Control and data go separate ways: one frame a step through each process's pipe, the model's sums through the group.
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
    """The processes of ranks 1 … size − 1. Without any (`size` 1) it says nothing to nobody."""

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
        """Start the others and meet them. `options[i]` are those of rank i's ops.

        Within `timeout` seconds a rank must be there, be ready, and do its part of any exchange. Raises `ConfigError`
        naming a rank that does not come, `RankDiedError` for one that ends.
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
        """Tell what the KV cache is like, and wait until everybody has one."""
        if self._processes:
            self.send(frame("cache", values))
            self._wait_for("ready")

    def send(self, message: bytes) -> None:
        """One frame to every rank."""
        for rank, process in enumerate(self._processes, 1):
            assert process.stdin is not None
            try:
                process.stdin.write(message)
                process.stdin.flush()
            except (BrokenPipeError, ValueError):
                raise RankDiedError(self._exit_message(rank)) from None

    def explain(self, error: RuntimeError) -> RuntimeError:
        """What to raise for a collective that failed: the death of a rank, where that is why."""
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
        """End them. May be called again."""
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

    def _spawn(self, said: dict[str, Any]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "headrace.engine.run.rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ,
        )
        self._processes.append(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(said).encode() + b"\n")
        process.stdin.flush()

    def _wait_for(self, what: str) -> None:
        """Wait for a line from every rank; raises what it says went wrong."""
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
                        f"rank {missing} of {self.size} was not {what} within {self._timeout:g} s: "
                        "see what it said on standard error, or raise rank_timeout"
                    )
                for key, _ in ready:
                    stdout: Any = key.fileobj
                    self._check_reply(key.data, stdout.readline(), what)
                    selector.unregister(stdout)

    def _check_reply(self, rank: int, line: bytes, what: str) -> None:
        if not line:
            self._processes[rank - 1].wait()
            raise RankDiedError(self._exit_message(rank))
        said = json.loads(line)
        if what not in said:
            kind = HeadraceError if said.get("bad_input") else RankDiedError
            raise kind(f"rank {rank} of {self.size}: {said.get('failed', said)}")

    def _report_exit(self, rank: int, process: subprocess.Popen[bytes], on_death: Callable[[str], None]) -> None:
        process.wait()
        if not self._closing:
            on_death(self._exit_message(rank))

    def _exit_message(self, rank: int) -> str:
        return f"rank {rank} of {self.size} ended with status {self._processes[rank - 1].poll()}: start the engine anew"
