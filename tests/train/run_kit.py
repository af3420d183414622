"""Reading what a run has left."""

import json

TIMES = ("tokens_per_second", "mfu", "memory_bytes")
"""Metrics that depend on the machine."""


def lines_of(out, *, timed=True):
    """metrics.jsonl, with or without what depends on the machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timed or k not in TIMES} for line in lines]
