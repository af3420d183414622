"""Runs one cell of the invariance matrix and returns every token and every logit that it sampled from.

A cell says how the work is *arranged*; the prompts, seeds and parameters are the same in all of them. So the tokens and
logits of prompt i must be the same bits in every cell.
"""

from __future__ import annotations

import atexit
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from headrace.engine.engine import Engine
from headrace.engine.run.ranks import Ranks
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.kernels.load import load_ops
from headrace.llm.assemble import assemble
from headrace.llm.options import EngineOptions
from headrace.llm.records import ResumeRecord
from headrace.model.huggingface import load_model
from invariance.records import known_tokens, record_of

TOKENS = 12
PROMPTS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.1, top_p=0.95, max_tokens=TOKENS, ignore_eos=True)
PENALISED = SamplingParams(
    temperature=0.9,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    max_tokens=TOKENS,
    ignore_eos=True,
)


@dataclass(frozen=True)
class Cell:
    """One arrangement. The defaults are the plainest: alone, whole, cold, undisturbed."""

    model: str = "tinyworld"
    sampling: str = "greedy"
    load: int = 1
    chunk: int = 4096
    prefix: str = "cold"
    preemption: str = "never"
    block_size: int = 16
    order: str = "forward"
    threads: int = 2
    resumed: bool = False
    depth: int = 1
    ranks: int = 1


AXES: dict[str, tuple[Any, ...]] = {
    "model": ("tinyworld", "gqa-qknorm", "bf16"),
    "sampling": ("greedy", "seeded", "penalised"),
    "load": (1, 2, 16, 64),
    "chunk": (4096, 64, 7, 1),
    "prefix": ("cold", "warm", "in-flight"),
    "preemption": ("never", "recompute", "swap"),
    "block_size": (16, 8, 32),
    "order": ("forward", "reverse", "staggered"),
    "threads": (2, 1),
    "resumed": (False, True),
    "depth": (1, 2),
    "ranks": (1, 2, 4),
}


@dataclass
class Trace:
    """What one prompt gave: its tokens, and the logits each was drawn from, by position."""

    tokens: list[int] = field(default_factory=list)
    logits: dict[int, bytes] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "logits": {p: row.hex() for p, row in self.logits.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trace:
        return cls(data["tokens"], {int(p): bytes.fromhex(row) for p, row in data["logits"].items()})


def prompts(vocab_size: int) -> list[list[int]]:
    """Mixed lengths; every fourth begins with one common prefix, and one crosses a split of attention."""
    draw = random.Random(5)
    common = [draw.randrange(2, vocab_size) for _ in range(70)]
    made = []
    for i in range(PROMPTS):
        own = [draw.randrange(2, vocab_size) for _ in range(draw.choice((1, 5, 16, 33, 60)))]
        made.append(common + own if i % 4 == 0 else own)
    made[2] = [draw.randrange(2, vocab_size) for _ in range(300)]
    return made


def request(number: int, prompt: list[int], sampling: str) -> Request:
    params = {"greedy": GREEDY, "seeded": SEEDED, "penalised": PENALISED}[sampling]
    return Request(number, prompt, params, seed=1000 + prompt[0] + len(prompt), choice=0)


@lru_cache
def others(folder: Path, ranks: int) -> Ranks:
    """The processes that hold the rest of a model, kept for all cells; each has one thread."""
    started = Ranks.start(ranks, folder, "cpu", [{"threads": 1}] * ranks, "auto", torch.device("cpu"), 120.0)
    atexit.register(started.close)
    return started


@lru_cache
def loaded(folder: Path, threads: int, ranks: int = 1) -> tuple[Any, Any]:
    ops = load_ops("cpu", threads=threads)
    return load_model(folder, ops, group=others(folder, ranks).group), ops


class Recorder:
    """Stands before a runner and keeps the logits of every row that is sampled."""

    def __init__(self, engine: Engine) -> None:
        self.traces: dict[int, Trace] = {}
        self._plan: Any = None
        runner = engine.runner
        submit, logits = runner.submit, runner.logits

        def spy_submit(plan: Any) -> Any:
            self._plan = plan
            return submit(plan)

        def spy_logits(batch: Any) -> torch.Tensor:
            rows = logits(batch)
            sampled = [s for s in self._plan.slices if s.targets]
            for s, row in zip(sampled, rows):
                trace = self.traces.setdefault(s.request_id, Trace())
                trace.logits[s.start + len(s.token_ids)] = row.numpy().tobytes()
            return rows

        runner.submit, runner.logits = spy_submit, spy_logits


def engine_for(cell: Cell, folder: Path, longest: int) -> Engine:
    """A fresh engine, arranged as the cell says. Preemption comes from a pool too small for the load."""
    model, ops = loaded(folder, cell.threads, cell.ranks)
    blocks = 1 + (PROMPTS + 8) * -(-(longest + TOKENS) // cell.block_size)
    if cell.preemption != "never":
        blocks = 1 + -(-(longest + TOKENS) // cell.block_size) + 64 // cell.block_size
    engine = assemble(
        model,
        ops,
        EngineOptions(
            threads=cell.threads,
            block_size=cell.block_size,
            num_kv_blocks=blocks,
            max_num_batched_tokens=cell.chunk,
            preemption="swap" if cell.preemption == "swap" else "recompute",
            queue_depth=cell.depth,
            prefix_caching=cell.prefix != "cold",
            max_num_seqs=PROMPTS,
        ),
        others(folder, cell.ranks),
    )
    return engine


def arrange(cell: Cell, requests: list[Request]) -> Iterator[list[Request]]:
    """Which requests arrive before which step."""
    if cell.order == "reverse":
        requests = requests[::-1]
    if cell.order == "staggered":
        for item in requests:
            yield [item]
            yield []
    else:
        yield requests


def drive(engine: Engine, arrivals: Iterator[list[Request]], steps: int | None = None) -> dict[int, list[int]]:
    """Run to the end, or for `steps` steps; returns output tokens by request."""
    tokens: dict[int, list[int]] = {}
    pending: Iterator[list[Request]] = arrivals
    for count in itertools.count():
        batch = next(pending, None)
        for item in batch or ():
            engine.scheduler.add(item)
        if (batch is None and not engine.has_work) or count == steps:
            return tokens
        for update in engine.step():
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
    raise AssertionError("unreachable")


def chosen(cell: Cell) -> list[int]:
    """Which prompts a cell runs: the long one always, then one with the common prefix, then all in order."""
    return {1: [2], 2: [0, 2]}.get(cell.load, list(range(cell.load)))


def run_alone(model: str, sampling: str, folder: Path, picked: Sequence[int] = range(PROMPTS)) -> dict[int, Trace]:
    """The baseline: every prompt by itself, one after the other, nothing shared."""
    cell = Cell(model, sampling)
    texts = prompts(loaded(folder, cell.threads)[0].config.vocab_size)
    engine = engine_for(cell, folder, max(map(len, texts)))
    recorder = Recorder(engine)
    for i in picked:
        tokens = drive(engine, iter([[request(i + 1, texts[i], sampling)]]))
        recorder.traces[i + 1].tokens = tokens[i + 1]
    return {i: recorder.traces[i + 1] for i in picked}


def run_cell(cell: Cell, folder: Path, worker: Worker | None = None) -> dict[int, Trace]:
    """Everything that the cell sampled, by prompt."""
    model, _ = loaded(folder, cell.threads)
    texts = prompts(model.config.vocab_size)
    picked = chosen(cell)
    engine = engine_for(cell, folder, max(len(texts[i]) for i in picked))
    requests = [request(i + 1, texts[i], cell.sampling) for i in picked]
    if cell.prefix == "warm":
        warm = [replace_id(request(i + 1, texts[i], cell.sampling), 1000 + i) for i in picked]
        drive(engine, iter([warm]))
    recorder = Recorder(engine)
    if cell.prefix == "in-flight":
        twins = [replace_id(request(i + 1, texts[i], cell.sampling), 2000 + i) for i in picked]
        requests = [r for pair in zip(twins, requests) for r in pair]
    if not cell.resumed:
        tokens = drive(engine, arrange(cell, requests))
        traces = {i: recorder.traces[i + 1] for i in picked}
        for i in picked:
            traces[i].tokens = tokens[i + 1]
        return traces
    assert worker is not None
    drive(engine, arrange(cell, requests), steps=6)
    begun = {r.request_id: record_of(r) for r in requests if r.request_id <= PROMPTS}
    rest = worker.resume(cell, folder, begun)
    traces = {}
    for i in picked:
        before = recorder.traces.get(i + 1, Trace()).logits
        after = rest[i + 1]
        known = known_tokens(begun[i + 1])
        traces[i] = Trace(
            begun[i + 1].output.outputs[0].token_ids + after.tokens,
            {**{p: row for p, row in before.items() if p < len(known)}, **after.logits},
        )
    return traces


def replace_id(item: Request, number: int) -> Request:
    return Request(number, item.prompt_token_ids, item.params, seed=item.seed, choice=item.choice)


def resume_here(cell: Cell, folder: Path, records: dict[int, ResumeRecord]) -> dict[int, Trace]:
    """Finish requests from their records in a fresh engine of this process."""
    engine = engine_for(replace(cell, prefix="cold"), folder, max(len(known_tokens(r)) for r in records.values()))
    recorder = Recorder(engine)
    open_ones = [
        record.requests([number], weights_version=0)[0]
        for number, record in records.items()
        if len(record.output.outputs[0].token_ids) < TOKENS
    ]
    tokens = drive(engine, iter([open_ones]))
    return {n: Trace(tokens.get(n, []), recorder.traces.get(n, Trace()).logits) for n in records}


class Worker:
    """Another process that finishes requests from records: one JSON line in, one out."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "invariance.worker"],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )

    def resume(self, cell: Cell, folder: Path, records: dict[int, ResumeRecord]) -> dict[int, Trace]:
        assert self._process.stdin is not None and self._process.stdout is not None
        plain = {number: record.to_dict() for number, record in records.items()}
        self._process.stdin.write(json.dumps({"cell": vars(cell), "folder": str(folder), "records": plain}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the worker died: its error is on standard error"
        return {int(n): Trace.from_json(t) for n, t in json.loads(answer).items()}

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def first_difference(expected: dict[int, Trace], got: dict[int, Trace]) -> str | None:
    """What differs first, in words; None if every token and every bit of every logit agrees."""
    for i, trace in got.items():
        if trace.tokens != expected[i].tokens:
            return f"prompt {i}: tokens {trace.tokens} are not {expected[i].tokens}"
        for position, row in expected[i].logits.items():
            if trace.logits.get(position) != row:
                return f"prompt {i}: logits at position {position} differ"
    return None


def pairwise(axes: dict[str, tuple[Any, ...]], seed: int = 0) -> list[Cell]:
    """A small set of cells in which every pair of values of every two axes stands together at least once."""
    draw = random.Random(seed)
    names = list(axes)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}
    cells = []

    def pairs(values: dict[str, Any]) -> set[Any]:
        return {((a, values[a]), (b, values[b])) for a, b in itertools.combinations(names, 2)}

    while missing:
        (a, x), (b, y) = min(missing, key=repr)
        tries = [{n: draw.choice(axes[n]) for n in names} | {a: x, b: y} for _ in range(60)]
        best = max(tries, key=lambda values: len(pairs(values) & missing))
        missing -= pairs(best)
        cells.append(Cell(**best))
    return cells


def full_product(axes: dict[str, tuple[Any, ...]]) -> Iterator[Cell]:
    for values in itertools.product(*axes.values()):
        yield Cell(**dict(zip(axes, values)))
