"""The instance's process: sockets, signals and exit, around an `Instance`.

It reads one line of JSON on its standard input, which stays open while the gateway runs: at end of file the process
exits, whatever it is doing. A thread receives commands; the engine's thread sends events.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

import msgspec
import zmq

from headrace.errors import HeadraceError
from headrace.instance.server import Instance
from headrace.instance.weights import reinstall
from headrace.instance.wire import (
    COMMANDS,
    EVENTS,
    Event,
    Failed,
    InstalledWeights,
    KernelProgress,
    Stop,
    decode_command,
    encode,
)
from headrace.llm.llm import LLM

__all__ = ["main"]


def main() -> int:
    """Serve until a `Stop` or the gateway's exit; returns the exit status."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # Ctrl-C reaches the whole process group; only the gateway's `Stop` counts
        signal.signal(number, signal.SIG_IGN)
    start: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    folder = Path(start["folder"])
    parent = threading.Thread(target=_exit_with_gateway, args=(sys.stdin.buffer, folder), name="parent", daemon=True)
    parent.start()
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    commands.bind(f"ipc://{folder / COMMANDS}")
    events.connect(f"ipc://{folder / EVENTS}")

    def send(event: Event) -> None:
        events.send(encode(event))

    try:
        llm = LLM(start["model"], progress=lambda *at: send(KernelProgress(*at)), **start["options"])
        llm.frontend.engine.runner.ranks.watch(_exit_with_rank)
        if start["weights"] is not None:
            reinstall(llm, msgspec.convert(start["weights"], InstalledWeights))
        instance = Instance(llm, send, start["name"])
        receiver = threading.Thread(target=_receive, args=(commands, instance), name="commands", daemon=True)
        receiver.start()
        gc.freeze()  # a full collection would visit all these objects again, and stop a step for 0.1 s
        send(instance.ready(time.monotonic() - start["began"]))
        instance.run()
    except HeadraceError as error:
        send(Failed(str(error), bad_input=True))
    except Exception as error:
        traceback.print_exc()
        send(Failed(f"{type(error).__name__}: {error}"))
    else:
        return _exit(0)
    parent.join()  # the gateway reads the reason, then closes our input
    return 1


def _receive(commands: zmq.Socket[bytes], instance: Instance) -> None:
    command: Any = None
    while not isinstance(command, Stop):
        try:
            command = decode_command(commands.recv())
        except ValueError as error:  # no answer would come for it: exit, and the gateway restarts the process
            print(f"headrace: {error}", file=sys.stderr)
            _exit(1)
        instance.post(command)


def _exit_with_rank(reason: str) -> None:
    """Without one of its ranks the model cannot run. The gateway detects the exit and starts another process."""
    print(f"headrace: {reason}", file=sys.stderr)
    _exit(1)


def _exit_with_gateway(stdin: IO[bytes], folder: Path) -> None:
    stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    _exit(1)


def _exit(status: int) -> int:
    """Exit at once: a normal exit would wait for threads that block in zmq."""
    sys.stderr.flush()
    os._exit(status)
