"""`python -m headrace.engine.run.rank`: the process of a rank above 0, which executes rank 0's frames.

Standard input: one line of JSON, then frames; the process exits at the end of the input. Standard output: one line
of JSON for each state that rank 0 waits for: started, ready, or failed with the reason.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import IO, Any

import torch

from headrace.engine.run.follower import Follower
from headrace.engine.run.frames import read_frame
from headrace.errors import HeadraceError
from headrace.kernels.load import load_ops
from headrace.model.huggingface import load_model
from headrace.parallel.rendezvous import connect, join

__all__ = ["main"]


def main() -> int:
    """Execute rank 0's frames until the input ends; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal signals every process; rank 0 decides when to stop
        signal.signal(number, signal.SIG_IGN)
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # all other output goes to standard error

    def report(**state: Any) -> None:
        reports.write(json.dumps(state) + "\n")
        reports.flush()

    frames = sys.stdin.buffer
    try:
        start: dict[str, Any] = json.loads(frames.readline())
    except ValueError:
        return 1
    try:
        _follow(start, frames, report)
    except HeadraceError as error:
        report(failed=str(error), bad_input=True)
        return 1
    except Exception as error:
        # Rank 0 ended during a collective, or this rank failed.
        traceback.print_exc()
        report(failed=f"{type(error).__name__}: {error}", bad_input=False)
        return 1
    return 0


def _follow(start: dict[str, Any], frames: IO[bytes], report: Any) -> None:
    rank, size = start["rank"], start["size"]
    torch.set_num_threads(start["threads"] or torch.get_num_threads())
    ops = load_ops(start["kernels"], **start["options"])
    report(started=rank)
    group = connect(join(start["port"], size, start["timeout"]), rank, size, ops.device, start["timeout"])
    model = load_model(start["folder"], ops, start["dtype"], group, serving=True)
    follower = Follower(model, ops, lambda: report(ready=rank))
    while (message := read_frame(frames)) is not None and follower.execute(*message):
        pass


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # without waiting for threads of a process group whose peer has ended
