"""The handle of a side of `bench/peers.py`: a process with its own session, stopped while others are measured."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peer_envs import Spec, last_error

__all__ = ["Running", "SideError"]

START_SECONDS = CELL_SECONDS = 900.0
FREE_TO_START = 6 * 2**30
KINDS = {"llama.cpp": "llama"}


class SideError(Exception):
    """A side that did not start, ended, or did not answer in time."""


class Running:
    """A side that starts when it is first needed; it ends, and starts again later, where memory is short."""

    def __init__(
        self, spec: Spec, python: str, model: Path, threads: int, logs: Path, preload: Sequence[str] = ()
    ) -> None:
        self.name = spec.name
        kind = KINDS.get(spec.peer, spec.peer)
        script = Path(__file__).with_name("peer_sides.py")
        self._command = [python, str(script), kind, str(model), str(threads), json.dumps(spec.options)]
        self._preload = preload
        self._log = logs / f"{spec.name}.log"
        self._process: subprocess.Popen[str] | None = None

    def wake(self, warm: dict[str, Any], others: Iterable[Running]) -> None:
        """Go on where it stopped, or start and warm up; then `others` end, one by one, until there is memory."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGCONT)
            return
        for side in others:
            if _available() > FREE_TO_START:
                break
            side.close()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # What headrace set for its own OpenMP threads when it was imported is not for the peers.
        env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
        if self._preload:
            env["LD_PRELOAD"] = ":".join(self._preload)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                start_new_session=True,
            )
        self._receive(START_SECONDS)
        self.ask(warm)

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """Do a task; returns its figures, with "memory", the peak bytes of all the side's processes."""
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        answer = self._receive(CELL_SECONDS)
        return {"memory": session_memory(process.pid), **answer}

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise SideError(f"no answer in {seconds:.0f} s: {last_error(self._log)}")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

    def _ended(self) -> SideError:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        return SideError(f"ended with status {self._process.poll()}: {last_error(self._log)}")

    def pause(self) -> None:
        """Stop its processes, so that no thread of theirs takes time from another side."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def close(self) -> None:
        """End its processes."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def session_memory(session: int) -> int:
    """Peak resident bytes of a session's processes, added."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found = re.search(r"VmHWM:\s+(\d+) kB", (stat.parent / "status").read_text())
                total += int(found[1]) * 1024 if found else 0
    return total


def _available() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0
