"""`headrace train --processes N`: the ranks of a run as processes of this machine, restarted when one of them crashes.

torchrun takes a recipe's mistake for a crash, and tries again. Here a rank that exits with `BAD_INPUT` ends the run.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from headrace.cli.parser import BAD_INPUT

__all__ = ["launch"]

CRASHED = 1
GRACE = 10.0
"""Seconds in which ranks end by themselves after one has failed, and then after SIGTERM."""
KEPT = 200
"""Lines of a rank's standard error that are kept."""


def launch(command: Sequence[str], processes: int, restarts: int) -> int:
    """Run `command` as each rank; after a crash again, with --resume, at most `restarts` times. Returns the exit code.

    Rank 0 writes to this process's standard output and error. What other ranks write to standard error is shown if
    the run fails, each line once.
    """
    for attempt in range(restarts + 1):
        ranks = _run(command if attempt == 0 else _resuming(command), processes)
        if all(rank.code == 0 for rank in ranks):
            return 0
        _show_others(ranks)
        crashed = next((rank for rank in ranks if rank.code not in (0, BAD_INPUT)), None)
        if crashed is None:
            return BAD_INPUT
        more = f"starting all again ({attempt + 1} of {restarts})" if attempt < restarts else "no restart is left"
        print(f"headrace: rank {crashed.rank} {crashed.end}: {more}", file=sys.stderr, flush=True)
    return CRASHED


class _Rank:
    """One process. `code` is its exit status, negative for a signal, None until it has ended by itself."""

    def __init__(self, rank: int, command: Sequence[str], environment: Mapping[str, str], ended: queue.Queue[Any]):
        self.rank = rank
        self.code: int | None = None
        self.lines: deque[str] = deque(maxlen=KEPT)
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the ranks.
        self._process = subprocess.Popen(
            command, env=dict(environment), stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        threading.Thread(target=lambda: ended.put((self, self._process.wait())), daemon=True).start()

    @property
    def end(self) -> str:
        """How it ended, for a message."""
        if self.code is None:
            return "did not end after another had failed"
        return f"was ended by signal {-self.code}" if self.code < 0 else f"failed with exit status {self.code}"

    def stop(self) -> None:
        """End it, and read the rest of its output."""
        self._process.terminate()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reader.join(GRACE)

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self.lines.append(line)
                if self.rank == 0:
                    sys.stderr.write(line)
                    sys.stderr.flush()


def _run(command: Sequence[str], processes: int) -> list[_Rank]:
    """Start all ranks, and wait until all have ended, or `GRACE` seconds after the first that failed."""
    ended: queue.Queue[tuple[_Rank, int]] = queue.Queue()
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder, _sigterm_raises():
        try:
            for rank in range(processes):
                ranks.append(_Rank(rank, command, _environment(rank, processes, Path(folder)), ended))
            deadline = None
            for _ in ranks:
                wait = None if deadline is None else max(0.0, deadline - time.monotonic())
                rank_ended, code = ended.get(timeout=wait)
                rank_ended.code = code
                if code and deadline is None:
                    deadline = time.monotonic() + GRACE
        except queue.Empty:
            pass
        finally:
            for one in ranks:
                one.stop()
    return ranks


def _environment(rank: int, processes: int, folder: Path) -> dict[str, str]:
    """torchrun's variables, and a file through which the ranks meet."""
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "HEADRACE_RENDEZVOUS": f"file://{folder / 'store'}",
    }


def _resuming(command: Sequence[str]) -> list[str]:
    return [*command, *(["--resume"] if "--resume" not in command else [])]


def _show_others(ranks: Sequence[_Rank]) -> None:
    """Print what ranks other than 0 wrote, without the lines that another rank has written too."""
    shown = set(ranks[0].lines)
    for rank in ranks[1:]:
        for line in rank.lines:
            plain = line.replace(f"headrace: rank {rank.rank}: ", "headrace: ", 1)
            if plain not in shown:
                shown.add(plain)
                sys.stderr.write(line)
    sys.stderr.flush()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """End with the ranks on SIGTERM, by `SystemExit`."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
