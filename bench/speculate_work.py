"""What `bench/speculate.py` measures speculation on: models, requests, and engines that run them.

A load is made anew for each round, so that no engine knows its text from the round before.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from headrace.bench.models import SHAPES, independent_pair, random_checkpoint
from headrace.config import ModelConfig
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.kernels.ops import Ops
from headrace.llm.assemble import assemble
from headrace.llm.options import EngineOptions
from headrace.model.huggingface import load_model
from headrace.model.transformer import Transformer
from headrace.text.tokenizer import Tokenizer
from headrace.train import tinyworld

PAIR = Path("runs/bench/pair")
KV = 192 * 2**20
GREEDY: dict[str, Any] = {"temperature": 0.0}


class Ask(NamedTuple):
    """A request to be made."""

    prompt: list[int]
    params: SamplingParams
    seed: int


class Ran(NamedTuple):
    """What a run gave."""

    seconds: float
    tokens: list[list[int]]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(map(len, self.tokens)) / self.seconds


Load = Callable[[int], list[Ask]]
"""The requests of a round, by its number."""


@dataclass(frozen=True)
class Models:
    """A target and the model that drafts for it."""

    name: str
    target: Transformer
    draft: Transformer
    ops: Ops


class Engine:
    """One engine that runs loads; what it has learned stays with it, as in a server."""

    def __init__(self, models: Models, speculate: str = "off", **options: Any) -> None:
        kind = speculate.partition(":")[0]
        given = EngineOptions(kv_cache_memory=KV, speculate=speculate, **options)
        self._engine = assemble(models.target, models.ops, given, draft=models.draft if kind == "draft" else None)
        self._next = 0

    def run(self, asks: list[Ask]) -> Ran:
        """Run all of them, in their order, as far as the engine has seats."""
        first = self._next
        outputs: list[list[int]] = [[] for _ in asks]
        self._next += len(asks)
        began = time.perf_counter()
        for i, ask in enumerate(asks):
            self._engine.scheduler.add(Request(first + i, ask.prompt, ask.params, seed=ask.seed))
        while self._engine.has_work:
            for update in self._engine.step():
                outputs[update.request_id - first] += update.token_ids
        return Ran(time.perf_counter() - began, outputs)

    @property
    def drafts(self) -> tuple[int, int, list[int]]:
        """Steps of a request that verified drafts, accepted drafts, and these by place; since the start."""
        stats = self._engine.scheduler.stats
        return stats.draft_steps, stats.accepted_tokens, list(stats.accepted_at)


# ---- models


def random_pair(ops: Ops) -> Models:
    """100M random parameters in bf16, and a draft of two layers that is never right."""
    small = SHAPES["small"]
    draft = replace(small, hidden_size=256, intermediate_size=768, num_layers=2, num_heads=4, num_kv_heads=4)
    folder = PAIR.parent
    return Models("random", _loaded(small, folder / "small", ops), _loaded(draft, folder / "small-draft", ops), ops)


def _loaded(shape: ModelConfig, folder: Path, ops: Ops) -> Transformer:
    return load_model(random_checkpoint(shape, folder, seed=shape.num_layers), ops, "auto", serving=True)


def trained_pair(ops: Ops, dtype: str = "auto") -> Models:
    """The models of the recipes `target` and `draft`, trained here once, which takes some ten minutes."""
    target, draft = (load_model(trained(name), ops, dtype, serving=True) for name in ("target", "draft"))
    return Models("trained", target, draft, ops)


def trained(name: str) -> Path:
    """The checkpoint of a recipe of the pair; it is trained, or the training goes on, where there is none yet."""
    folder = PAIR / name
    if not (folder / "hf" / "config.json").exists():
        resume = ["--resume"] if (folder / "run.json").exists() else []
        command = [str(Path(sys.executable).with_name("headrace")), "train", name, "--out", str(folder), *resume]
        subprocess.run(command, check=True)
    return folder / "hf"


def known_pair(ops: Ops) -> tuple[Models, list[float], list[float]]:
    """A pair whose acceptances are independent, and both distributions."""
    shape = replace(SHAPES["tiny"], vocab_size=64, tie_word_embeddings=False)
    (target, draft), (p, q) = independent_pair((shape, shape), ops, noise=1.0, seed=3)
    return Models("independent", target, draft, ops), p, q


# ---- loads


def tokenizer() -> Tokenizer:
    """The trained pair's."""
    return Tokenizer.from_folder(trained("target"))


def noise(batch: int, output: int, prompt: int = 32) -> Load:
    """Requests at once whose tokens nobody can guess: random weights at temperature 1."""

    def load(number: int) -> list[Ask]:
        draw = random.Random(f"{batch} {number}")
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        return [Ask(_random(draw, prompt), params, draw.randrange(10**6)) for _ in range(batch)]

    return load


def arriving(number_of: int) -> Load:
    """Requests of many lengths, more than there are seats: prompts come while others decode."""

    def load(number: int) -> list[Ask]:
        draw = random.Random(number)
        return [
            Ask(
                _random(draw, draw.randrange(32, 257)),
                SamplingParams(max_tokens=draw.randrange(8, 33), ignore_eos=True),
                draw.randrange(10**6),
            )
            for _ in range(number_of)
        ]

    return load


def _random(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(1000, 31000) for _ in range(length)]


def story_samples(count: int = 40) -> Load:
    """So many samples of the continuation of one opening, at temperature 1."""
    words = tokenizer()

    def load(number: int) -> list[Ask]:
        opening = words.encode(f"Once upon a time, {tinyworld.PEOPLE[number % len(tinyworld.PEOPLE)]}")
        return [Ask(opening, SamplingParams(max_tokens=40), 1000 * number + i) for i in range(count)]

    return load


def questions_again(count: int = 12, times: int = 4) -> Load:
    """Lists and objects to write, each asked several times: a finished answer is the next one's draft."""
    words = tokenizer()

    def load(number: int) -> list[Ask]:
        draw = random.Random(number)
        kinds = ("list", "object")
        questions = [tinyworld.held_out_question(kinds[i % 2], 100 * number + i) for i in range(count)]
        asked = [words.encode(question.prompt) for question in questions]
        asks = [Ask(prompt, SamplingParams(max_tokens=60, **GREEDY), 0) for prompt in asked * times]
        draw.shuffle(asks)
        return asks

    return load


Change = Callable[[list[int], random.Random], list[int]]


def replaced(text: list[int], draw: random.Random) -> list[int]:
    """A text in which one token of 20 is another."""
    return [draw.randrange(512) if draw.random() < 0.05 else token for token in text]


def edited(text: list[int], draw: random.Random) -> list[int]:
    """A text before an edit: about every 40 tokens a span of up to 8 is missing, new or another."""
    out: list[int] = []
    i = 0
    while i < len(text):
        if draw.random() < 1 / 40:
            size, kind = draw.randrange(2, 9), draw.randrange(3)
            out += [draw.randrange(512) for _ in range(size)] if kind else []
            i += size if kind != 1 else 0
        else:
            out.append(text[i])
            i += 1
    return out


def predicted(writer: Engine, change: Change, count: int, output: int = 160) -> tuple[Load, Load]:
    """Texts that the model writes, with a prediction of each that is not quite right; and the same without it."""
    words = tokenizer()
    made: dict[int, list[Ask]] = {}

    def plain(number: int) -> list[Ask]:
        openings = tinyworld.prompts(4 * count, number)[::4]
        params = SamplingParams(max_tokens=output, ignore_eos=True, **GREEDY)
        return [Ask(words.encode(text), params, 0) for text in openings]

    def load(number: int) -> list[Ask]:
        if number not in made:
            draw, asks = random.Random(number), plain(number)
            texts = writer.run(asks).tokens
            made[number] = [
                ask._replace(params=replace(ask.params, prediction=tuple(change(text, draw))))
                for ask, text in zip(asks, texts)
            ]
        return made[number]

    return load, plain


def stories(count: int, temperature: float) -> Load:
    """Openings of different stories, each told to its end."""
    words = tokenizer()

    def load(number: int) -> list[Ask]:
        params = SamplingParams(temperature=temperature, max_tokens=160)
        return [Ask(words.encode(text), params, number) for text in tinyworld.prompts(4 * count, number)[::4]]

    return load


def steady(count: int, output: int) -> Load:
    """Requests of the pair of independent tokens."""
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    return lambda number: [Ask([1, 2, 3], params, 1000 * number + i) for i in range(count)]
