"""Reading what a run has left, and killing one of its ranks."""

import json
import os
import signal
import subprocess

import psutil

from serve.http_kit import until

TIMES = ("tokens_per_second", "mfu", "memory_bytes")
"""Metrics that depend on the machine."""


def lines_of(out, *, timed=True):
    """metrics.jsonl, with or without what depends on the machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timed or k not in TIMES} for line in lines]


def killed_once(command, out):
    """Start ranks that train into `out`, kill rank 1 after three steps; returns what was said until all have ended."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as launcher:
        until(lambda: (out / "metrics.jsonl").exists() and len(lines_of(out)) >= 3)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        [second] = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
        os.kill(second.pid, signal.SIGKILL)
        _, said = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, said
    return said
