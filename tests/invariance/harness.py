"""Runs one cell of the invariance matrix and returns every token and every logit that it sampled from.

A cell says how the work is *arranged*; the prompts, seeds and parameters are the same in all cells with one
`question`. So the tokens and logits of prompt i must be the same bits in all of them.
"""

from __future__ import annotations

import atexit
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from headrace.engine.engine import Engine
from headrace.engine.run.ranks import Ranks
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.grammar.grammars import Grammars
from headrace.kernels.load import load_ops
from headrace.llm.assemble import assemble
from headrace.llm.options import EngineOptions
from headrace.llm.records import ResumeRecord
from headrace.llm.speculation import draft_model
from headrace.model.huggingface import load_model
from headrace.model.transformer import Transformer
from headrace.speculate.speculation import Speculation
from headrace.text.tokenizer import Tokenizer
from invariance.axis import PROMPTS, TOKENS, Setup
from invariance.cells import AXES, Cell, question
from invariance.driving import Recorder, Trace, drive

__all__ = ["Worker", "chosen", "finish", "first_difference", "prompts", "run_alone", "run_cell"]

Records = Mapping[int, ResumeRecord]
Folders = Mapping[str, Path]
Finish = Callable[[Cell, Folders, Records], dict[int, Trace]]
"""finish(cell, folders, records) → what is left of requests that began elsewhere, by number."""


@lru_cache
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


@lru_cache
def others(folder: Path, ranks: int) -> Ranks:
    """The processes that hold the rest of a model, kept for all cells; each has one thread."""
    started = Ranks.start(ranks, folder, "cpu", [{"threads": 1}] * ranks, "auto", torch.device("cpu"), 120.0)
    atexit.register(started.close)
    return started


@lru_cache
def loaded(folder: Path, threads: int, ranks: int = 1, serving: bool = False) -> tuple[Any, Any]:
    ops = load_ops("cpu", threads=threads)
    return load_model(folder, ops, group=others(folder, ranks).group, serving=serving), ops


@lru_cache
def rounded(folder: Path, threads: int) -> Transformer:
    """A draft model that is right often, but not always."""
    return load_model(folder, loaded(folder, threads)[1], "bfloat16", serving=True)


@lru_cache
def grammars(folder: Path, vocab_size: int) -> Grammars:
    return Grammars(Tokenizer.from_folder(folder), vocab_size)


def hooks(cell: Cell, hook: str) -> Iterator[tuple[Callable[..., Any], Any]]:
    """The axes' functions of this name, each with the cell's value on its axis."""
    for name, axis in AXES.items():
        if (function := getattr(axis, hook)) is not None:
            yield function, getattr(cell, name)


def setup_of(cell: Cell) -> Setup:
    setup = Setup()
    for function, value in hooks(cell, "setup"):
        function(setup, value)
    return setup


def chosen(cell: Cell) -> list[int]:
    """The numbers of the prompts that a cell runs."""
    return setup_of(cell).prompts


def request(number: int, cell: Cell, vocab_size: int) -> Request:
    """Prompt `number` as a request of the same number."""
    prompt = prompts(vocab_size)[number]
    params = SamplingParams(**setup_of(cell).params)
    return Request(number, prompt, params, seed=1000 + prompt[0] + len(prompt), choice=0)


def engine_for(setup: Setup, folder: Path, longest: int) -> Engine:
    """A new engine; `longest` prompts must fit its cache."""
    model, ops = loaded(folder, setup.threads, setup.ranks, setup.serving)
    size = setup.options["block_size"]
    blocks = 1 + setup.sequences * -(-(longest + TOKENS) // size) + setup.spare_tokens // size
    options = EngineOptions(threads=setup.threads, num_kv_blocks=blocks, max_num_seqs=PROMPTS, **setup.options)
    speculation = None
    if setup.gamma is not None:
        draft = draft_model(rounded(folder, setup.threads), ops, options, blocks) if setup.draft else None
        speculation = Speculation(setup.proposers, setup.gamma, draft)
    ranks, masks = others(folder, setup.ranks), grammars(folder, model.config.vocab_size).mask
    return assemble(model, ops, options, ranks, masks, speculator=speculation)


class Run:
    """A cell, a new engine arranged as the cell says, and the requests that it runs."""

    def __init__(self, cell: Cell, folders: Folders, requests: Sequence[Request], finish: Finish) -> None:
        self.cell, self.requests = cell, list(requests)
        self._folders, self._finish = folders, finish
        setup = setup_of(cell)
        engine = engine_for(setup, folders[setup.model], max(len(item.token_ids) for item in requests))
        for prepare, value in hooks(cell, "prepare"):
            prepare(engine, self.requests, value)
        self.engine, self._recorder = engine, Recorder(engine)

    def drive(self, steps: int | None = None) -> dict[int, Trace]:
        """What the requests give until the end, or in `steps` steps."""
        running = self.requests
        for change, value in hooks(self.cell, "requests"):
            running = change(running, value)
        batches = [running]
        for change, value in hooks(self.cell, "arrivals"):
            batches = change(batches, value)
        tokens = drive(self.engine, batches, steps)
        traces = {item.request_id: self._recorder.trace(item.request_id) for item in self.requests}
        for number, trace in traces.items():
            trace.tokens = tokens.get(number, [])
        return traces

    def elsewhere(self, records: Records, **changes: Any) -> dict[int, Trace]:
        """What another process gives that goes on from records, under the same cell but for `changes`."""
        return self._finish(replace(self.cell, **changes), self._folders, records)


def play(cell: Cell, folders: Folders, requests: Sequence[Request], finish: Finish) -> dict[int, Trace]:
    """Run the requests as the cell says: what each gave."""
    run = Run(cell, folders, requests, finish)
    for name, axis in AXES.items():
        value = getattr(cell, name)
        if axis.play is not None and value != axis.values[0]:
            return axis.play(run, value)
    return run.drive()


def finish(cell: Cell, folders: Folders, records: Records) -> dict[int, Trace]:
    """Finish requests from their records in this process: the new tokens and logits of each."""
    unfinished = [
        record.requests([number], weights_version=0)[0]
        for number, record in records.items()
        if len(record.output.outputs[0].token_ids) < TOKENS
    ]
    done = {number: Trace() for number in records}
    return done | (play(cell, folders, unfinished, finish) if unfinished else {})


def run_cell(cell: Cell, folders: Folders, finish: Finish) -> dict[int, Trace]:
    """Everything that the cell sampled, by prompt."""
    setup = setup_of(cell)
    vocab_size = loaded(folders[setup.model], setup.threads)[0].config.vocab_size
    return play(cell, folders, [request(i, cell, vocab_size) for i in setup.prompts], finish)


def run_alone(cell: Cell, folders: Folders, picked: Sequence[int] = range(PROMPTS)) -> dict[int, Trace]:
    """The baseline of a cell: every prompt by itself, one after the other, nothing shared."""
    cell = question(cell)
    setup = setup_of(cell)
    vocab_size = loaded(folders[setup.model], setup.threads)[0].config.vocab_size
    run = Run(cell, folders, [request(i, cell, vocab_size) for i in picked], finish)
    requests = run.requests
    traces: dict[int, Trace] = {}
    for item in requests:
        run.requests = [item]
        traces |= run.drive()
    return traces


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

    def finish(self, cell: Cell, folders: Folders, records: Records) -> dict[int, Trace]:
        assert self._process.stdin is not None and self._process.stdout is not None
        plain = {number: record.to_dict() for number, record in records.items()}
        job = {"cell": vars(cell), "folders": {name: str(f) for name, f in folders.items()}, "records": plain}
        self._process.stdin.write(json.dumps(job) + "\n")
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
