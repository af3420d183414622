"""`python -m headrace.engine.run.rank`: a rank above 0. It holds its part of the model and does what rank 0 says.

Its standard input brings one line of JSON, then frames; at the input's end it goes. Its standard output carries a
line of JSON where rank 0 waits for one: it is there, it is ready, or why it is neither.
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
    """Follow rank 0 to its end; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; rank 0 says when to stop
        signal.signal(number, signal.SIG_IGN)
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints belongs on standard error

    def say(**what: Any) -> None:
        said.write(json.dumps(what) + "\n")
        said.flush()

    frames = sys.stdin.buffer
    try:
        start: dict[str, Any] = json.loads(frames.readline())
    except ValueError:
        return 1
    try:
        _follow(start, frames, say)
    except HeadraceError as error:
        say(failed=str(error), bad_input=True)
        return 1
    except Exception as error:
        # Rank 0 has gone in the middle of a collective, or something is wrong here: either way, say and leave.
        traceback.print_exc()
        say(failed=f"{type(error).__name__}: {error}", bad_input=False)
        return 1
    return 0


def _follow(start: dict[str, Any], frames: IO[bytes], say: Any) -> None:
    rank, size = start["rank"], start["size"]
    torch.set_num_threads(start["threads"] or torch.get_num_threads())
    ops = load_ops(start["kernels"], **start["options"])
    say(started=rank)
    group = connect(join(start["port"], size, start["timeout"]), rank, size, ops.device, start["timeout"])
    follower = Follower(load_model(start["folder"], ops, start["dtype"], group), ops, lambda: say(ready=rank))
    while (message := read_frame(frames)) is not None and follower.execute(*message):
        pass


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # threads of a process group that lost its peer have nothing to say any more
