"""Workloads, and a driver that runs one through an engine and times every token."""

from __future__ import annotations

import csv
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.bench.traces import lengths
from headrace.engine.engine import Engine
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams

__all__ = ["Job", "Outcome", "conversation_lengths", "random_jobs", "run_jobs"]

TRACE = "traces/azure2023"


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, the number of tokens to generate, and the engine's step at which it arrives."""

    prompt: Sequence[int]
    output: int
    arrival: int = 0


@dataclass(slots=True)
class Outcome:
    """Each job's tokens and their times, in seconds from the start."""

    seconds: float = 0.0
    steps: int = 0
    times: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    @property
    def gaps(self) -> list[float]:
        """Seconds between successive tokens of a job, for all jobs."""
        return [b - a for times in self.times.values() for a, b in zip(times, times[1:])]

    @property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return sum(map(len, self.tokens.values()))


def conversation_lengths(count: int, scale: float, seed: int = 0) -> tuple[str, list[tuple[int, int]]]:
    """(source, (prompt, output) lengths × `scale`) of Azure conversations of 2023, if HEADRACE_DATA has them.

    Otherwise they are drawn from lognormals with that trace's medians and 99th percentiles.
    """
    draw = random.Random(seed)
    folder = Path(os.environ.get("HEADRACE_DATA", "")) / TRACE
    files = sorted(folder.rglob("*conv.csv")) if os.environ.get("HEADRACE_DATA") else []
    if files:
        with files[0].open() as lines:
            rows = [(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in csv.DictReader(lines)]
        source, picked = "Azure 2023 conversations", draw.sample(rows, count)
    else:
        source, picked = "lognormal with the medians of Azure 2023 conversations", lengths(count, draw)
    return f"{source} × {scale:g}", [(max(1, round(p * scale)), max(1, round(o * scale))) for p, o in picked]


def random_jobs(lengths: Iterable[tuple[int, int]], vocab_size: int, seed: int = 0, prefix: int = 0) -> list[Job]:
    """Jobs of random tokens after the same `prefix` tokens."""
    draw = random.Random(seed)
    shared = [draw.randrange(2, vocab_size) for _ in range(prefix)]
    return [Job(shared + [draw.randrange(2, vocab_size) for _ in range(p)], o) for p, o in lengths]


def run_jobs(engine: Engine[Any], jobs: Sequence[Job], params: SamplingParams | None = None) -> Outcome:
    """Run every job to its end; greedy and without end tokens by default."""
    outcome = Outcome()
    waiting = sorted(enumerate(jobs, 1), key=lambda item: item[1].arrival)
    start = time.perf_counter()
    while waiting or engine.has_work:
        while waiting and (waiting[0][1].arrival <= outcome.steps or not engine.has_work):
            number, job = waiting.pop(0)
            engine.scheduler.add(
                Request(
                    number,
                    job.prompt,
                    params or SamplingParams(temperature=0.0, max_tokens=job.output, ignore_eos=True),
                    seed=number,
                )
            )
        for update in engine.step():
            now = time.perf_counter() - start
            outcome.times.setdefault(update.request_id, []).extend([now] * len(update.token_ids))
            outcome.tokens.setdefault(update.request_id, []).extend(update.token_ids)
        outcome.steps += 1
    outcome.seconds = time.perf_counter() - start
    return outcome
