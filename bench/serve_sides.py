"""The sides of `bench/serve.py`, each in its own process: servers, LLM.generate, a prober.

    python bench/serve_sides.py llm CHECKPOINT OPTIONS | probe URL

A worker reads a JSON line, does it, and answers with a JSON line. One that is not being measured waits on its standard
input and computes nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from peer_sides import healthy

START_SECONDS = 900.0
PROBE_PAUSE = 0.01


class Worker:
    """The benchmark's handle of a worker process."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def send(self, task: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("a worker ended: its standard error has the cause")
        return json.loads(answer)

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        self.send(task)
        return self.receive()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class RunningServer:
    """A running server, the seconds until it was ready, and its process."""

    def __init__(self, url: str, pid: int, seconds: float) -> None:
        self.url = url
        self.pid = pid
        self.seconds = seconds

    def resident_mib(self, peak: bool = False) -> float:
        """Memory of the process without its children; for headrace, the gateway."""
        name = "VmHWM" if peak else "VmRSS"
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024


@contextlib.contextmanager
def headrace(checkpoint: Path, *flags: str, cache: Path | None = None) -> Iterator[RunningServer]:
    """`headrace serve` on a free port, until the end of the block. `cache` is the folder of its kernels."""
    command = [sys.executable, "-m", "headrace", "serve", str(checkpoint), "--port", "0", *flags]
    env = os.environ | ({"HEADRACE_CACHE_DIR": str(cache)} if cache else {})
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.search(r"http://\S+", ready)
        if not found:
            raise SystemExit(f"headrace serve did not start: {ready!r}")
        yield RunningServer(found[0], process.pid, time.perf_counter() - start)
    finally:
        _end(process)


@contextlib.contextmanager
def peer(command: str) -> Iterator[RunningServer]:
    """Another server: a command with {port} in it. It is ready when /health answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            shlex.split(command.replace("{port}", str(port))), stdout=log, stderr=log, start_new_session=True
        )
        try:
            while not healthy(port):
                if process.poll() is not None or time.perf_counter() - start > START_SECONDS:
                    log.seek(0)
                    raise SystemExit(f"{command} did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.05)
            yield RunningServer(f"http://127.0.0.1:{port}", process.pid, time.perf_counter() - start)
        finally:
            _end(process, group=True)


def _end(process: subprocess.Popen[Any], group: bool = False) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        if group:  # its children too
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _llm(checkpoint: str, options: str) -> Any:
    """LLM.generate; a task is {"prompts": [...], "output": n}."""
    from headrace import LLM, SamplingParams

    model = LLM(checkpoint, **json.loads(options))

    def run(task: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(temperature=0.0, max_tokens=task["output"], ignore_eos=True)
        start = time.perf_counter()
        outputs = model.generate([{"prompt_token_ids": ids} for ids in task["prompts"]], params)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(len(o.outputs[0].token_ids) for o in outputs)}

    return run


def _probe(url: str) -> Any:
    """GETs in turn on connections that stay open, until the next line comes; a task is {"paths": [...]}."""
    parts = urlsplit(url)

    def run(task: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, list[float]] = {path: [] for path in task["paths"]}
        connections = {path: http.client.HTTPConnection(parts.hostname or "", parts.port) for path in found}
        while not select.select([sys.stdin], [], [], PROBE_PAUSE)[0]:
            for path, connection in connections.items():
                start = time.perf_counter()
                connection.request("GET", path)
                answer = connection.getresponse()
                answer.read()
                found[path].append(time.perf_counter() - start)
                assert answer.status == 200, f"{path} answers {answer.status}"
        sys.stdin.readline()
        for connection in connections.values():
            connection.close()
        return {"seconds": found}

    return run


def main() -> None:
    """Serve one side."""
    kind, *arguments = sys.argv[1:]
    out, sys.stdout = sys.stdout, sys.stderr
    sides: dict[str, Callable[..., Any]] = {"llm": _llm, "probe": _probe}
    run = sides[kind](*arguments)
    while line := sys.stdin.readline():  # not an iterator: it would read ahead of the prober's select
        out.write(json.dumps(run(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
