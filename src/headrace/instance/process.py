"""The instance's process: sockets, signals and its end, around an `Instance`.

It reads one line of JSON on its standard input, which stays open as long as the gateway lives: at its end the
process goes, whatever it is doing. Commands come in on a thread of their own; news leave on the engine's.
"""

from __future__ import annotations

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
from headrace.instance.weights import put_back
from headrace.instance.wire import COMMANDS, EVENTS, Event, Failed, Progress, Stop, Weights, decode_command, encode
from headrace.llm.llm import LLM

__all__ = ["main"]


def main() -> int:
    """Serve until a `Stop` or the gateway's end; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the gateway says when to stop
        signal.signal(number, signal.SIG_IGN)
    start: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    folder = Path(start["folder"])
    parent = threading.Thread(target=_outlive_nobody, args=(sys.stdin.buffer, folder), name="parent", daemon=True)
    parent.start()
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    commands.bind(f"ipc://{folder / COMMANDS}")
    events.connect(f"ipc://{folder / EVENTS}")

    def send(event: Event) -> None:
        events.send(encode(event))

    try:
        llm = LLM(start["model"], progress=lambda *at: send(Progress(*at)), **start["options"])
        llm.frontend.engine.runner.ranks.watch(_die_too)
        if start["weights"] is not None:
            put_back(llm, msgspec.convert(start["weights"], Weights))
        instance = Instance(llm, send)
        receiver = threading.Thread(target=_receive, args=(commands, instance), name="commands", daemon=True)
        receiver.start()
        send(instance.ready(time.monotonic() - start["began"]))
        instance.run()
    except HeadraceError as error:
        send(Failed(str(error), bad_input=True))
    except Exception as error:
        traceback.print_exc()
        send(Failed(f"{type(error).__name__}: {error}"))
    else:
        return _leave(0)
    parent.join()  # the gateway reads why, and closes our input
    return 1


def _receive(commands: zmq.Socket[bytes], instance: Instance) -> None:
    command: Any = None
    while not isinstance(command, Stop):
        try:
            command = decode_command(commands.recv())
        except ValueError as error:  # a gateway of this version sends none; to read on would leave it waiting
            print(f"headrace: {error}", file=sys.stderr)
            _leave(1)
        instance.post(command)


def _die_too(obituary: str) -> None:
    """A rank has ended: so has the model. The gateway sees this process end, and starts another."""
    print(f"headrace: {obituary}", file=sys.stderr)
    _leave(1)


def _outlive_nobody(stdin: IO[bytes], folder: Path) -> None:
    stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    _leave(1)


def _leave(status: int) -> int:
    """End at once: threads that block in zmq have nothing to say any more."""
    sys.stderr.flush()
    os._exit(status)
