"""A server as users start it: `headrace serve` in a process of its own, on a free port."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

FLAGS = ("--threads", "1", "--num-kv-blocks", "400", "--max-num-batched-tokens", "48", "--max-num-seqs", "16")

ORDINARY = {"prompt": "Once upon a time, Mia", "temperature": 0, "max_tokens": 12, "return_token_ids": True}
PATIENCE = 120.0
"""Timeout of `until`, in seconds."""


def until(condition: Callable[[], object]) -> None:
    """Poll until the condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"


class Served:
    """A server that runs, and a client of it."""

    def __init__(self, process: subprocess.Popen[str], ready: str) -> None:
        self.process = process
        self.ready = ready
        match = re.search(r"(http://\S+) · model (\S+)", ready)
        assert match, f"the server said {ready!r}"
        self.url, self.model = match[1], match[2]
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str, /, **fields: object) -> httpx.Response:
        """A request with JSON fields."""
        return self.client.post(path, json=fields)

    def ordinary_tokens(self) -> list[int]:
        """The tokens of one ordinary request: they must not depend on earlier requests."""
        answer = self.post("/v1/completions", **ORDINARY)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.client.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def instance_pid(self) -> int:
        """The engine's process, which is not the template worker's."""
        import psutil

        [pid] = [
            child.pid for child in psutil.Process(self.process.pid).children() if "headrace.instance" in child.cmdline()
        ]
        return pid


@contextlib.contextmanager
def served(folder: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """`headrace serve FOLDER`, until the end of the block; it must exit with status 0."""
    command = [sys.executable, "-m", "headrace", "serve", str(folder), "--port", "0", *FLAGS, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    try:
        server = Served(process, process.stdout.readline())
        with server.client:
            yield server
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
