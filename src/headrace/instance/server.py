"""`Instance`: one engine that executes a gateway's commands. Sockets are in `process.py`.

commands ──> EngineLoop ──> executed between steps ──> Frontend.step ──> one EventBatch a step
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, fields

import torch

from headrace.engine.schedule.stats import SchedulerStats
from headrace.errors import CheckpointError, RequestError
from headrace.instance.deltas import SentOutput
from headrace.instance.explain import Explainer
from headrace.instance.weights import install
from headrace.instance.wire import (
    Abort,
    Accepted,
    Add,
    Command,
    Embed,
    Embedding,
    EngineEvent,
    EventBatch,
    Inspect,
    Ready,
    Refused,
    Resume,
    StepReport,
    Stop,
    Tree,
    UpdateWeights,
    WeightsUpdated,
)
from headrace.llm.llm import LLM
from headrace.llm.loop import EngineLoop, EngineStoppedError

__all__ = ["Instance"]

EDGE_TOKENS = 8
"""Tokens of a radix tree's edge that are shown as text."""
_STATS = [f.name for f in fields(SchedulerStats) if f.name != "finished"]


class Instance:
    """Everything but the transport. The thread that calls `run` owns the engine; any thread may call `post`."""

    def __init__(self, llm: LLM, send: Callable[[EventBatch], None], name: str = "0") -> None:
        """`send` takes the events of a step; it is called on the engine's thread and may block.

        `name` tells this instance from others behind the same gateway.
        """
        self._name = name
        self._llm = llm
        self._frontend = llm.frontend
        self._scheduler = llm.frontend.engine.scheduler
        self._send = send
        self._loop = EngineLoop()
        self._explainer = Explainer(self._scheduler)
        self._sent: dict[str, SentOutput] = {}
        self._embeds: dict[str, list[int]] = {}
        self._compiling: dict[str, tuple[Add | Resume, float]] = {}
        """Requests that wait for a grammar while steps go on, and since when."""
        self._events: list[EngineEvent] = []
        self._changed = False
        """Whether a request ended or the cache was emptied outside a step since the last report."""

    def ready(self, startup_seconds: float) -> Ready:
        """This engine's description for the gateway. `startup_seconds` from the process's start to now."""
        scheduler = self._scheduler
        return Ready(
            instance=self._name,
            pid=os.getpid(),
            fingerprint=self._frontend.fingerprint,
            max_model_len=scheduler.max_model_len,
            vocab_size=self._frontend.model_config.vocab_size,
            kv_tokens=scheduler.limits.capacity,
            kv_blocks=scheduler.cache.pool.num_usable,
            block_size=scheduler.cache.block_size,
            default_sampling_params=self._llm.default_sampling_params(),
            startup_seconds=startup_seconds,
            hidden_size=self._frontend.model_config.hidden_size,
            folder="" if self._llm.folder is None else str(self._llm.folder),
            weights_version=self._frontend.weights_version,
        )

    def post(self, command: Command) -> None:
        """Queue a command, to be executed before the next step. Order is kept."""
        if isinstance(command, Stop):
            self._loop.stop()
        else:
            self._loop.post(lambda: self._execute(command))

    def run(self) -> None:
        """Run steps until a `Stop`. Raises what a step raises."""
        self._loop.run(self._busy, self._step)

    def _busy(self) -> bool:
        return bool(self._embeds) or self._frontend.has_work

    def _step(self) -> None:
        """Run one step of the engine and one embedding; send the events of both as one message."""
        report: StepReport | None = None
        if self._frontend.has_work:
            began = time.monotonic()
            groups = self._frontend.step()
            plan = self._frontend.engine.last_plan
            prompts, others = (0, 0) if plan is None else self._explainer.observe(plan, began)
            for group in groups:
                delta = self._sent[group.name].delta(group.output)
                if delta is None:
                    continue
                if delta.output.finished:
                    del self._sent[group.name]
                    delta.explanation = self._explainer.finish(group.name, delta.output.num_cached_tokens)
                self._events.append(delta)
            report = self._report(prompts, others, time.monotonic() - began)
        elif self._changed:
            report = self._report()
        self._changed = False
        if self._embeds:
            name = next(iter(self._embeds))
            self._embed(name, self._embeds.pop(name))
        if report is not None:
            self._events.append(report)
        if self._events:
            events, self._events = self._events, []
            self._send(EventBatch(events))

    def _report(self, prefill_tokens: int = 0, decode_tokens: int = 0, seconds: float = 0.0) -> StepReport:
        stats = self._scheduler.stats
        values = {name: getattr(stats, name) for name in _STATS} | {"finished": stats.finished}
        values |= asdict(self._frontend.mask_stats)
        return StepReport(self._name, values, prefill_tokens, decode_tokens, seconds)

    # ---- commands

    def _execute(self, command: Command) -> None:
        try:
            if isinstance(command, (Add, Resume)):
                self._begin(command)
            elif isinstance(command, Abort):
                self._abort(command.name)
            elif isinstance(command, Embed):
                self._check_embed(command)
                self._embeds[command.name] = command.prompt_token_ids
            elif isinstance(command, Inspect):
                self._events.append(self._tree(command))
            elif isinstance(command, UpdateWeights):
                self._update(command)
        except RequestError as error:
            self._events.append(Refused.by(getattr(command, "name", ""), error))

    def _begin(self, command: Add | Resume) -> None:
        """Add a request, at once or when its grammar is compiled."""
        params = command.params if isinstance(command, Add) else command.record.params
        prepared = self._frontend.prepare(params)
        if prepared is None:
            self._add(command)
            return
        self._compiling[command.name] = command, time.monotonic()
        prepared.add_done_callback(lambda done: self._post_compiled(command, done))

    def _post_compiled(self, command: Add | Resume, done: Future[None]) -> None:
        with contextlib.suppress(EngineStoppedError):  # a stopped engine runs no request
            self._loop.post(lambda: self._take_compiled(command, done))

    def _take_compiled(self, command: Add | Resume, done: Future[None]) -> None:
        waiting, since = self._compiling.get(command.name, (None, 0.0))
        if waiting is not command:  # it was aborted
            return
        del self._compiling[command.name]
        try:
            done.result()
            self._add(command, time.monotonic() - since)
        except RequestError as error:
            self._events.append(Refused.by(command.name, error))
        except Exception as error:  # of this request's grammar: the others go on
            self._events.append(Refused(command.name, f"the constraint cannot be compiled: {error!r}", "constraint"))

    def _add(self, command: Add | Resume, compile_time: float = 0.0) -> None:
        if isinstance(command, Resume):
            name = self._frontend.resume(command.record)
        else:
            ids, params = command.prompt_token_ids, command.params
            name = self._frontend.add(ids, params, command.name, command.priority, command.cache_key)
        self._enter(name, compile_time)

    def _enter(self, name: str, compile_time: float) -> None:
        """The gateway has what the output holds already: the output of a resumed request is not sent again."""
        group = self._frontend.group(name)
        self._sent[name] = SentOutput(group.output)
        self._explainer.arrived(name, group.choices, compile_time)
        self._events.append(Accepted(name))

    def _abort(self, name: str) -> None:
        self._embeds.pop(name, None)
        self._compiling.pop(name, None)
        output = self._frontend.abort(name)
        if output is not None:
            del self._sent[name]
            self._explainer.finish(name, output.num_cached_tokens)
            self._changed = True

    def _update(self, update: UpdateWeights) -> None:
        try:
            weights = install(self._llm, update.folder, update.version)
        except CheckpointError as error:
            self._events.append(Refused(update.name, str(error), "path"))
        else:
            self._events.append(WeightsUpdated(update.name, weights))
            self._changed = True

    def _check_embed(self, embed: Embed) -> None:
        self._scheduler.limits.check_prompt(len(embed.prompt_token_ids))
        self._frontend.check_ids("prompt", embed.prompt_token_ids)

    def _embed(self, name: str, ids: list[int]) -> None:
        """The mean over positions of the last norm's output, which is what the head reads: fp32 [D].

        Positions are added one after another in fp64, so that the number of threads is nowhere in the sum.
        """
        hidden_TD = self._frontend.engine.runner.hidden(ids)
        total_D = torch.zeros(hidden_TD.shape[1], dtype=torch.float64)
        for hidden_D in hidden_TD.cpu().double():
            total_D += hidden_D
        vector = (total_D / len(ids)).float().tolist()
        self._events.append(Embedding(name, vector, self._frontend.weights_version))

    def _tree(self, inspect: Inspect) -> Tree:
        """A block's number serves as its node's id. Parents stand before their children."""
        cache, tokenizer = self._scheduler.cache, self._llm.tokenizer
        rows: list[tuple[int, int, int, int, str]] = []
        for node in cache.tree.nodes():
            if len(rows) == inspect.max_nodes:
                return Tree(inspect.name, rows, complete=False)
            parent = -1 if node.parent is None or node.parent.parent is None else node.parent.block
            text = tokenizer.decode(node.key[:EDGE_TOKENS], skip_special_tokens=False)
            rows.append((node.block, parent, len(node.key), node.locks, text))
        return Tree(inspect.name, rows)
