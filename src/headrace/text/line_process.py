"""`LineProcess`: untrusted work in a process that can be killed, one line of JSON to it and one back for each job.

run ──> one line to the process ──> its `serve_lines` ──> one line back
         └── over its time or size limit, or dead: killed, and the next call starts another
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["NICE", "LineProcess", "serve_lines"]

START_SECONDS = 20.0
MEMORY = 1 << 30
"""Limit of the process's address space, in bytes."""
MAX_LINE = 1 << 26
"""Limit of an answer, in bytes."""
NICE = 15
"""What such work adds to its niceness: it gives way to the engine's threads."""
READ = 1 << 16
MAIN = "import os, sys; os.nice({}); sys.path.append(sys.argv[1]); from {} import {} as main; main(*sys.argv[2:])"
"""Imports are a second of work, so they give way too. This package's folder is last on the path, for where headrace is
imported without being installed."""


class LineProcess:
    """One process, started on first use, that does one job at a time, for one thread at a time."""

    def __init__(self, what: str, module: str, function: str, seconds: float, arguments: Sequence[str] = ()) -> None:
        """`function` of `module` is the process's main, which calls `serve_lines`; `what` names it in errors."""
        self._what = what
        self._main = MAIN.format(NICE, module, function)
        self._arguments = list(arguments)
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def run(self, line: bytes) -> Any:
        """The answer to a job, both JSON.

        Raises `TimeoutError` at the time limit, `BrokenPipeError` where the process died or wrote too much, and
        `ChildProcessError` if no process starts.
        """
        process = self._running()
        try:
            return json.loads(_exchange(process, line + b"\n", self._seconds))
        except TimeoutError:
            self.close()
            raise
        except (OSError, ValueError):
            self.close()
            raise BrokenPipeError from None
        except BaseException:  # an interrupt: the answer would be the next job's
            self.close()
            raise

    def start(self) -> None:
        """Start the process unless it runs, so that the first job does not wait for it."""
        self._running()

    def close(self) -> None:
        """End the process; a later call starts another."""
        self._process = None
        if self._end is not None:
            self._end()

    @property
    def pid(self) -> int | None:
        """The process's id, if it runs."""
        return None if self._process is None else self._process.pid

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", self._main, str(Path(__file__).parents[2]), *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
            self._end = weakref.finalize(self, _kill, process)
            try:
                _exchange(process, b"", START_SECONDS)
            except BaseException as error:  # a half started process would give the next caller this caller's answer
                self.close()
                if isinstance(error, (OSError, ValueError)):
                    raise ChildProcessError(f"the process for {self._what} does not start") from None
                raise
        return self._process


def serve_lines(answer: Callable[[Any], Mapping[str, Any]]) -> None:
    """The rest of a process's main: the answer to each job from standard input, until end of file.

    The first, empty line says that the process is ready.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(flush=True)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


def _exchange(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes:
    """Send a line, and read the answer's. `TimeoutError`: not in time; `ValueError`: too long; `OSError`: it died."""
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + seconds
    _write(process.stdin, line)
    ready = select.poll()
    ready.register(process.stdout, select.POLLIN)
    pieces: list[bytes] = []
    size = 0
    while not pieces or not pieces[-1].endswith(b"\n"):
        if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        pieces.append(os.read(process.stdout.fileno(), READ))
        size += len(pieces[-1])
        if not pieces[-1]:
            raise BrokenPipeError
        if size > MAX_LINE:
            raise ValueError
    return b"".join(pieces)


def _write(stream: IO[bytes], line: bytes) -> None:
    """Write the whole line: the process reads whenever no job runs, so this does not block for long."""
    left = memoryview(line)
    while left:
        left = left[stream.write(left) :]


def _kill(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.kill()
    process.stdin.close()
    process.stdout.close()
    process.wait()
