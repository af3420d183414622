"""Traces of real traffic, and a synthetic one: arrival times, lengths, and shared prefixes of requests.

Two formats, recognised by their content: Azure's CSV (TIMESTAMP,ContextTokens,GeneratedTokens) and Mooncake's JSONL
(timestamp in ms, input_length, output_length, and hash_ids: one for each block of 512 tokens).
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from headrace.config import require
from headrace.errors import ConfigError

__all__ = [
    "BLOCK_TOKENS",
    "Prompts",
    "TraceRow",
    "fitting_scale",
    "lengths",
    "read_trace",
    "request_count",
    "schedule",
    "synthetic",
]

BLOCK_TOKENS = 512
"""Tokens that one hash id of a Mooncake trace stands for."""
FIRST_ID = 3
"""Smaller token ids are special tokens in most vocabularies."""
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length")
SHARED, OWN = 0, 1
PROMPT_P50, PROMPT_P99 = 1020, 4142
OUTPUT_P50, OUTPUT_P99 = 129, 601
"""Of Azure's conversations of 2023."""
Z99 = 2.3263


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    time: float
    """Seconds, from an arbitrary start."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """Requests with the same first k of these share their first k blocks."""


def read_trace(path: Path) -> list[TraceRow]:
    """The rows, sorted by time. Raises `ConfigError` for a missing file, or one that is not a trace."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {path} cannot be read: {error}") from None
    head = next((line.strip() for line in lines if line.strip()), "")
    if head.startswith("{"):
        rows = _mooncake(path, lines)
    elif set(AZURE) <= {name.strip() for name in head.split(",")}:
        rows = _azure(path, lines)
    else:
        raise ConfigError(
            f"{path} is not a trace: neither a CSV with {','.join(AZURE)} nor JSON lines with {', '.join(MOONCAKE)}"
        )
    require(bool(rows), f"the trace {path} holds no requests")
    return sorted(rows, key=lambda row: row.time)


def synthetic(count: int, seed: int = 0) -> list[TraceRow]:
    """Requests that arrive one a second on average (Poisson), with the lengths of `lengths`."""
    draw, now, rows = random.Random(seed), 0.0, []
    for prompt, output in lengths(count, draw):
        now += draw.expovariate(1.0)
        rows.append(TraceRow(now, prompt, output))
    return rows


def lengths(count: int, draw: random.Random) -> list[tuple[int, int]]:
    """(prompt, output) lengths, from lognormals with the medians and 99th percentiles of Azure's conversations."""
    return [(_lognormal(draw, PROMPT_P50, PROMPT_P99), _lognormal(draw, OUTPUT_P50, OUTPUT_P99)) for _ in range(count)]


def _lognormal(draw: random.Random, p50: float, p99: float) -> int:
    return round(draw.lognormvariate(math.log(p50), math.log(p99 / p50) / Z99))


def _azure(path: Path, lines: Sequence[str]) -> list[TraceRow]:
    rows = []
    reader = csv.DictReader(lines, skipinitialspace=True)
    for item in reader:
        try:
            stamp, prompt, output = (item[name] for name in AZURE)
            rows.append(_row(datetime.fromisoformat(stamp).timestamp(), int(prompt), int(output)))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}:{reader.line_num} is not a request: {error}") from None
    return rows


def _mooncake(path: Path, lines: Sequence[str]) -> list[TraceRow]:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            stamp, prompt, output = (item[name] for name in MOONCAKE)
            ids = tuple(int(i) for i in item.get("hash_ids", ()))
            rows.append(_row(float(stamp) / 1000, int(prompt), int(output), ids))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ConfigError(f"{path}:{number} is not a request: {type(error).__name__}: {error}") from None
    return rows


def _row(time: float, prompt: int, output: int, ids: tuple[int, ...] = ()) -> TraceRow:
    if prompt < 0 or output < 0 or not math.isfinite(time) or any(i < 0 for i in ids):
        raise ValueError("a number is negative or not finite")
    return TraceRow(time, prompt, output, ids)


def request_count(rate: float, duration: float, max_requests: int | None = None) -> int:
    """The number of requests at `rate` a second for `duration` seconds: at least one, at most `max_requests`."""
    require(0 < rate < math.inf, f"rate={rate:g} must be a number of requests a second above 0")
    require(0 < duration < math.inf, f"duration={duration:g} must be a time in seconds above 0")
    require(max_requests is None or max_requests > 0, f"max_requests={max_requests} must be above 0")
    count = math.floor(rate * duration + 1e-9)
    return max(1, count if max_requests is None else min(count, max_requests))


def fitting_scale(rows: Iterable[TraceRow], longest: int) -> float:
    """A factor on all lengths, at most 1 and of two digits, with which prompt and output together are `longest`."""
    exact = max(longest - 2, 1e-6) / max(row.input_tokens + row.output_tokens for row in rows)  # both may be rounded up
    digit = 10.0 ** (math.floor(math.log10(exact)) - 1)
    return min(1.0, float(f"{math.floor(exact / digit) * digit:.2g}"))


def schedule(
    rows: Sequence[TraceRow], rate: float, duration: float, max_requests: int | None = None
) -> list[tuple[float, TraceRow]]:
    """(seconds from the start, row) of the requests to send: a mean of `rate` a second for `duration` seconds.

    They are the trace's first rate · duration requests, with the trace's distances scaled by one factor, so bursts stay
    bursts. A shorter trace is sent once, and ends earlier.
    """
    count = min(request_count(rate, duration, max_requests), len(rows))
    if count == 1:
        return [(0.0, rows[0])]
    start = rows[0].time
    # The window ends at the next request; after the last one, a mean distance is added.
    window = rows[count].time - start if count < len(rows) else (rows[-1].time - start) * count / (count - 1)
    require(
        window > 0,
        f"the first {count} requests of the trace have the same time, so they cannot be spread: use another trace",
    )
    return [((row.time - start) / window * (count / rate), row) for row in rows[:count]]


class Prompts:
    """Random token ids of a trace's lengths. Rows with the same leading hash ids have the same leading blocks.

    `scale` applies to lengths and blocks alike, so the shared fraction stays the same.
    """

    def __init__(self, vocab_size: int = 1000, seed: int = 0, scale: float = 1.0) -> None:
        """Ids are drawn from 3 to `vocab_size` - 1. The same seed gives the same prompts."""
        require(vocab_size > FIRST_ID + 1, f"vocab_size={vocab_size} must be above {FIRST_ID + 1}")
        require(seed >= 0, f"seed={seed} must not be negative")
        require(0 < scale < math.inf, f"scale={scale:g} must be a number above 0")
        self._vocab_size = vocab_size
        self._seed = seed
        self._scale = scale

    def lengths(self, row: TraceRow) -> tuple[int, int]:
        """(prompt tokens, output tokens) of a row, at least one each."""
        return max(1, round(row.input_tokens * self._scale)), max(1, round(row.output_tokens * self._scale))

    def make(self, number: int, row: TraceRow) -> list[int]:
        """The prompt of row `number`; tokens beyond its hash ids are the row's own."""
        length, _ = self.lengths(row)
        ids: list[int] = []
        for i, block in enumerate(row.hash_ids):
            if len(ids) >= length:
                break
            # A scaled block ends at its whole block's end times the scale, rounded.
            ids += self._draw(SHARED, block, round((i + 1) * BLOCK_TOKENS * self._scale) - len(ids))
        return ids[:length] + self._draw(OWN, number, length - len(ids))

    def _draw(self, kind: int, number: int, count: int) -> list[int]:
        if count <= 0:
            return []
        draw = np.random.default_rng((self._seed, kind, number))
        drawn: list[int] = draw.integers(FIRST_ID, self._vocab_size, count).tolist()
        return drawn
