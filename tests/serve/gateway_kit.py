"""Helpers for tests of the gateway: requests of every kind, comparisons with an engine's output, an observer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace import LLM, RequestOutput, SamplingParams
from headrace.serve.gateway import Gateway, Stream

OPTIONS: dict[str, Any] = {"threads": 1, "num_kv_blocks": 200, "max_num_batched_tokens": 48, "max_num_seqs": 16}

KINDS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=2),
    "seeded": SamplingParams(seed=3, max_tokens=40, logprobs=0),
    "penalised": SamplingParams(seed=4, max_tokens=40, repetition_penalty=1.2, presence_penalty=0.3, min_tokens=5),
    "choices": SamplingParams(seed=5, max_tokens=30, n=3, logprobs=1),
    "scored": SamplingParams(seed=6, max_tokens=20, prompt_logprobs=2, logprobs=1, ignore_eos=True),
    "beam": SamplingParams(beam_width=3, n=2, max_tokens=20, logprobs=1, prompt_logprobs=1),
    "biased": SamplingParams(seed=2**64 - 1, max_tokens=20, logit_bias={5: 4.0, 9: -100.0}, stop_token_ids=(7,)),
}
PROMPT = "Once upon a time, there was a child called Mia, who lived in a small house near the sea. One day"


def kinds(llm: LLM) -> dict[str, SamplingParams]:
    """`KINDS`, and stop strings of several tokens that this model does generate."""
    plain = replace(KINDS["seeded"], max_tokens=60, ignore_eos=True)
    text = llm.generate(PROMPT, plain)[0].outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 7]
    return {
        **KINDS,
        "stopped": replace(plain, stop=(stop, "never to be seen")),
        "stop shown": replace(plain, stop=(stop,), include_stop_str_in_output=True, logprobs=None),
    }


def same(output: RequestOutput, expected: RequestOutput) -> None:
    """Everything a client gets of its tokens, by ==."""
    assert output.outputs == expected.outputs
    assert output.prompt_logprobs == expected.prompt_logprobs
    assert output.finished and expected.finished


async def check_stream(stream: Stream, expected: RequestOutput) -> None:
    """Read a stream to its end: its deltas add up to the expected output."""
    texts = [""] * len(expected.outputs)
    tokens: list[list[int]] = [[] for _ in expected.outputs]
    over = [False] * len(expected.outputs)
    async for delta in stream:
        for new in delta.output.outputs:
            assert not over[new.index], "an event of a finished choice"
            over[new.index] = new.finish_reason is not None
            texts[new.index] += new.text
            tokens[new.index] += new.token_ids
    same(stream.output, expected)
    assert texts == [c.text for c in expected.outputs]
    assert tokens == [c.token_ids for c in expected.outputs]
    assert all(over) and stream.explanation is not None


class Watcher:
    """An observer that records its calls, and kills the instance at given tokens."""

    def __init__(self) -> None:
        self.gateway: Gateway | None = None
        self.kill_at: list[int] = []
        """Counts of deltas with tokens, in order, at which the instance dies."""
        self.killed = 0
        """The process that was killed last: what it had sent before counts, and kills no second time."""
        self.deltas = 0
        self.told: list[tuple[Any, ...]] = []
        self.steps = 0
        self.restart = asyncio.Event()

    def ready(self, info: Any) -> None:
        pass

    def arrived(self, instance: str, name: str, prompt_tokens: int) -> None:
        self.told.append(("arrived", name, prompt_tokens))

    def first_token(self, instance: str, name: str, seconds: float) -> None:
        self.told.append(("first_token", name))
        self._count()

    def token_gap(self, instance: str, name: str, seconds: float) -> None:
        self._count()

    def finished(self, instance: str, name: str, reason: str, *details: Any) -> None:
        self.told.append(("finished", name, reason))

    def called(self, instance: str, calls: int) -> None:
        self.told.append(("called", calls))

    def stepped(self, report: Any) -> None:
        self.steps += 1

    def restarted(self, instance: str) -> None:
        self.told.append(("restarted",))
        self.restart.set()

    def _count(self) -> None:
        self.deltas += 1
        assert self.gateway is not None
        if self.kill_at and self.deltas >= self.kill_at[0] and self.gateway.info.pid != self.killed:
            del self.kill_at[0]
            self.killed = self.gateway.info.pid
            os.kill(self.killed, signal.SIGKILL)


async def begun(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """The coroutine's task, after it has run to its first await: a loop runs callbacks in the order of scheduling."""
    task, turn = asyncio.create_task(coroutine), asyncio.Event()
    asyncio.get_running_loop().call_soon(turn.set)
    await turn.wait()
    return task


async def start(folder: Path, **changes: Any) -> tuple[Gateway, Watcher]:
    """A gateway that is ready. `changes` are keywords of `Gateway`, `options` among them."""
    watcher = Watcher()
    settings = {"max_queue": 64, "observer": watcher, **changes}
    options = {**OPTIONS, **settings.pop("options", {})}
    watcher.gateway = Gateway(str(folder), options, **settings)
    await watcher.gateway.start()
    return watcher.gateway, watcher
