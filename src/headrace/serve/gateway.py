"""`Gateway`: requests in, deltas out, over instance processes that may die and be restarted.

It keeps every unfinished request's transcript, so that a restarted instance can continue it with the same tokens.
Transport (HTTP) is not its concern, nor is the life of a process: see `InstanceSupervisor`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from headrace.cache.key import CacheKey
from headrace.config import require
from headrace.engine.schedule.sampling import MAX_LOGPROBS, SamplingParams
from headrace.instance.supervisor import Death, InstanceSupervisor
from headrace.instance.wire import (
    Abort,
    Accepted,
    Command,
    Delta,
    Embed,
    Embedding,
    EventBatch,
    Inspect,
    Ready,
    Refused,
    StepReport,
    Tree,
    UpdateWeights,
    WeightsUpdated,
)
from headrace.llm.options import EngineOptions
from headrace.llm.records import ResumeRecord
from headrace.serve.errors import QueueFullError, RefusedError, UnavailableError
from headrace.serve.observer import GatewayObserver
from headrace.serve.pending import PendingCommands
from headrace.serve.stream import ReportFeed, Stream
from headrace.serve.transcript import Transcript

__all__ = ["Gateway", "GatewayObserver", "QueueFullError", "RefusedError", "Stream", "UnavailableError"]

INSTANCES = ("0",)
"""Names, as the label `engine` of metrics has them."""
DROP_AFTER = 3
"""Deaths of an instance in a row without progress after which its requests are dropped: one may be the cause."""


class Gateway:
    """One model's requests, over its instances. Its `on_…` methods are callbacks of their supervisors."""

    def __init__(
        self,
        model: str,
        options: dict[str, Any],
        *,
        max_queue: int,
        restart: bool = True,
        max_logprobs: int = 20,
        observer: GatewayObserver | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        """`options` are fields of `EngineOptions`, JSON values; `ConfigError` if they cannot work.

        `max_queue` counts sequences beyond the engine's `max_num_seqs`. `progress(done, total, kernel)` is called
        while kernels compile.
        """
        require(0 <= max_logprobs <= MAX_LOGPROBS, f"max_logprobs={max_logprobs} must be from 0 to {MAX_LOGPROBS}")
        require(max_queue >= 0, f"max_queue={max_queue} must not be negative")
        self.max_num_seqs = EngineOptions(**options).max_num_seqs * len(INSTANCES)
        """Of all instances."""
        self.max_queue = max_queue
        self.observer = observer
        self._instances = {
            name: InstanceSupervisor(name, model, options, self, restart=restart, progress=progress)
            for name in INSTANCES
        }
        self._max_logprobs = max_logprobs
        self._draining = self._stopped = False
        self._names = itertools.count(1)
        self._streams: dict[str, Stream] = {}
        self._embeds: PendingCommands[Embed, Embedding] = PendingCommands()
        self._trees: PendingCommands[Inspect, Tree] = PendingCommands()
        self._updates: PendingCommands[UpdateWeights, int] = PendingCommands()
        self._feeds: set[ReportFeed] = set()
        self._idle: asyncio.Event = asyncio.Event()
        self._ends: deque[float] = deque([time.monotonic()], maxlen=33)
        """When the latest requests ended."""

    # ---- start and stop

    @property
    def state(self) -> str:
        """ "starting", "ready", "restarting", "draining", "failed" or "stopped": of the instance that is best off."""
        if self._stopped:
            return "stopped"
        states = {instance.state for instance in self._instances.values()}
        best = next(state for state in ("ready", "restarting", "starting", "failed", "stopped") if state in states)
        return "draining" if self._draining and best in ("ready", "restarting") else best

    @property
    def restarts(self) -> int:
        """Processes that died and were replaced."""
        return sum(instance.restarts for instance in self._instances.values())

    async def start(self) -> None:
        """Return when models are loaded. `HeadraceError`: the user's mistake; `InstanceDiedError`: anything else."""
        for instance in self._instances.values():
            await instance.start()
            if self.observer is not None:
                self.observer.ready(instance.ready)

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, give the running ones `timeout` seconds, then stop."""
        self._draining = True
        self._note_idle()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        await self.stop()

    async def stop(self) -> None:
        """End the instances; requests that still run get an `UnavailableError`. May be called again."""
        self._stopped = True
        for name in self._instances:
            self._fail_requests(name, "the server is stopping")
        await asyncio.gather(*(instance.stop() for instance in self._instances.values()))
        for feed in self._feeds:
            feed.close()

    # ---- the instances

    def _pick(self) -> InstanceSupervisor:
        """The instance for a new request. There is one: balancing starts here."""
        return next(iter(self._instances.values()))

    @property
    def info(self) -> Ready:
        """Of the instance that a new request would go to."""
        return self._pick().ready

    @property
    def report(self) -> StepReport | None:
        """The latest step's, of the instance that a new request would go to."""
        return self._pick().report

    @property
    def weights_version(self) -> int:
        """Of the weights of the instance that a new request would go to."""
        return self._pick().weights_version

    # ---- requests

    async def open(
        self,
        name: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_key: CacheKey = CacheKey(),
    ) -> Stream:
        """Queue a request; returns when an instance has accepted it. While the instance restarts, the request waits.

        A request without a seed gets a random one. Raises `RefusedError` if it can never be served, `QueueFullError`
        if the queue is full, `UnavailableError` if no instance is ready or restarting.
        """
        self._check(params)
        self._make_room(max(params.n, params.beam_width))
        instance, wire = self._pick(), str(next(self._names))
        transcript = Transcript(wire, ResumeRecord.begin(name, prompt, prompt_token_ids, params, priority, cache_key))
        transcript.output.weights_version = instance.weights_version
        stream = Stream(transcript, instance.name, self._abort)
        self._streams[wire] = stream
        if self.observer is not None:
            self.observer.arrived(instance.name, name, len(prompt_token_ids))
        try:
            self._submit(stream)
            await stream.until_accepted()
        except BaseException:
            stream.abandon()
            raise
        return stream

    async def embed(self, name: str, prompt_token_ids: list[int]) -> Embedding:
        """The mean over a prompt's positions of the model's last hidden states. Raises what `open` raises."""
        self._make_room(1)
        instance, wire = self._pick().name, str(next(self._names))
        embed = Embed(wire, prompt_token_ids)
        answer = self._embeds.add(wire, instance, embed)
        if self.observer is not None:
            self.observer.arrived(instance, name, len(prompt_token_ids))
        try:
            self._send(instance, embed)
            return await answer
        finally:
            if self._embeds.discard(wire):
                self._send(instance, Abort(wire))
            self._note_idle()

    async def update_weights(self, folder: str, version: int | None = None) -> int:
        """Load a folder's weights into every engine, between two steps; returns their version (None: the next one).

        Running requests continue under them, and a restarted engine gets them too. Raises `RefusedError` where they do
        not fit, `UnavailableError` where an engine is not ready or dies: then its weights have not changed.
        """
        not_ready = [s for s in (self.state, *(i.state for i in self._instances.values())) if s != "ready"]
        if not_ready:
            raise UnavailableError(f"the engine is {not_ready[0]}")
        answers = []
        for instance in self._instances:
            update = UpdateWeights(str(next(self._names)), folder, version)
            self._send(instance, update)
            answers.append(self._updates.add(update.name, instance, update))
        return (await asyncio.gather(*answers))[0]

    async def inspect(self, max_nodes: int = 500) -> Tree:
        """The radix tree of the prefix cache that a new request would meet. `UnavailableError` if none is ready."""
        instance = self._pick()
        if self._stopped or instance.state != "ready":
            raise UnavailableError(f"the engine is {self.state}")
        inspect = Inspect(str(next(self._names)), max_nodes)
        self._send(instance.name, inspect)
        return await self._trees.add(inspect.name, instance.name, inspect)

    async def reports(self) -> AsyncIterator[StepReport]:
        """Step reports from now on, until the gateway stops; a slow reader misses some and delays no other."""
        feed = ReportFeed()
        self._feeds.add(feed)
        try:
            async for report in feed:
                yield report
        finally:
            self._feeds.discard(feed)

    @property
    def seats(self) -> int:
        """Sequences that may run or wait at once, at most."""
        return self.max_num_seqs + self.max_queue

    @property
    def unfinished(self) -> int:
        """Sequences that run or wait."""
        return sum(stream.transcript.seats for stream in self._streams.values()) + len(self._embeds)

    def _check(self, params: SamplingParams) -> None:
        for field in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, field)
            if asked is not None and asked > self._max_logprobs:
                reason = f"{{{field}}}={{}} is more than this server's limit of {{}}"
                raise RefusedError.about(field, reason, asked, self._max_logprobs)

    def _make_room(self, seats: int) -> None:
        """Raise `QueueFullError` if the queue is full. A request that is alone is never refused for its size."""
        if self.state not in ("ready", "restarting"):
            raise UnavailableError(f"the engine is {self.state}")
        taken = self.unfinished
        if taken and taken + seats > self.seats:
            span = time.monotonic() - self._ends[0]
            wait = math.ceil(span / len(self._ends))
            raise QueueFullError(max(0, taken - self.max_num_seqs), min(max(wait, 1), 60))

    def _submit(self, stream: Stream) -> None:
        fingerprint = self._instances[stream.instance].ready.fingerprint
        try:
            self._send(stream.instance, stream.transcript.command(fingerprint))
        except RefusedError as error:
            self._refuse(Refused.by(stream.transcript.wire_name, error))

    def _send(self, instance: str, command: Command) -> None:
        """Send a command to an instance that is ready; one that restarts gets its requests in `on_restart`."""
        try:
            self._instances[instance].send(command)
        except (UnicodeError, OverflowError) as error:
            raise RefusedError(f"the request holds what cannot be sent: {error}") from None

    def _abort(self, stream: Stream) -> None:
        """The caller has closed the stream."""
        if self._streams.pop(stream.transcript.wire_name, None) is not None:
            self._send(stream.instance, Abort(stream.transcript.wire_name))
            stream.end()
            self._note_end(stream, "abort")

    # ---- what instances report

    def on_events(self, name: str, batch: EventBatch) -> None:
        """Pass each event to the stream or command that it belongs to."""
        now = time.monotonic()
        for event in batch.events:
            if isinstance(event, Delta):
                self._take(event, now)
            elif isinstance(event, StepReport):
                self._publish(event)
            elif isinstance(event, Accepted):
                if event.name in self._streams:
                    self._streams[event.name].accept()
            elif isinstance(event, Refused):
                self._refuse(event)
            elif isinstance(event, Embedding):
                self._embeds.resolve(event.name, event)
            elif isinstance(event, WeightsUpdated):
                self._updates.resolve(event.name, event.weights.version)
            else:
                self._trees.resolve(event.name, event)

    def on_death(self, name: str, death: Death) -> None:
        """Requests wait for the restart, unless they may be the cause of the deaths."""
        self._trees.fail_instance(name, UnavailableError(death.reason))
        self._updates.fail_instance(name, UnavailableError(f"{death.reason}, and its weights are those of before"))
        if death.restarting and death.in_a_row >= DROP_AFTER:
            self._fail_requests(name, f"{death.reason} {death.in_a_row} times in a row")

    def called(self, stream: Stream, calls: int) -> None:
        """Count the tool calls of a finished choice of a stream."""
        if self.observer is not None and calls:
            self.observer.called(stream.instance, calls)

    def on_restart(self, name: str, before: Ready) -> None:
        """Send an instance's unfinished requests to its new process, in the order they came."""
        now = self._instances[name].ready.fingerprint
        if now != before.fingerprint:
            self._fail_requests(name, f"the new engine is {now}, not {before.fingerprint}: its tokens could differ")
        for stream in self._streams_of(name):
            stream.resumes += stream.accepted
            self._submit(stream)
        for embed in self._embeds.of_instance(name):
            self._send(name, embed)
        if self.observer is not None:
            self.observer.restarted(name)

    def on_failure(self, name: str, reason: str) -> None:
        """An instance is lost for good, with its requests."""
        self._fail_requests(name, reason)

    def _take(self, delta: Delta, now: float) -> None:
        stream = self._streams.get(delta.name)
        if stream is None:  # aborted meanwhile
            return
        if delta.explanation is not None:
            delta.explanation.resumes = stream.resumes
        stream.take(delta)
        if any(choice.token_ids for choice in delta.output.outputs):
            if self.observer is not None and stream.last_token is None:
                self.observer.first_token(stream.instance, stream.name, now - stream.opened)
            elif self.observer is not None and stream.last_token is not None:
                self.observer.token_gap(stream.instance, stream.name, now - stream.last_token)
            stream.last_token = now
        if delta.output.finished:
            del self._streams[delta.name]
            self._note_end(stream, str(stream.output.outputs[0].finish_reason))

    def _publish(self, report: StepReport) -> None:
        if self.observer is not None:
            self.observer.stepped(report)
        for feed in self._feeds:
            feed.push(report)

    def _refuse(self, refused: Refused) -> None:
        stream = self._streams.pop(refused.name, None)
        if stream is not None and stream.accepted:
            stream.fail(UnavailableError(f"the new engine refused to go on: {refused.message}"))
            self._note_end(stream, "error")
        elif stream is not None:
            stream.fail(refused.error())
            self._note_end(stream, "refused")
        else:
            self._embeds.fail(refused.name, refused.error())
            self._updates.fail(refused.name, refused.error())

    def _note_end(self, stream: Stream, reason: str) -> None:
        now = time.monotonic()
        self._ends.append(now)
        if self.observer is not None:
            params, seconds = stream.transcript.params, now - stream.opened
            self.observer.finished(
                stream.instance, stream.name, reason, params, stream.output, stream.explanation, seconds
            )
        self._note_idle()

    def _note_idle(self) -> None:
        if self._streams or self._embeds:
            self._idle.clear()
        else:
            self._idle.set()

    def _streams_of(self, instance: str) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.instance == instance]

    def _fail_requests(self, instance: str, why: str) -> None:
        for stream in self._streams_of(instance):
            del self._streams[stream.transcript.wire_name]
            stream.fail(UnavailableError(why))
            self._note_end(stream, "error")
        for pending in (self._embeds, self._trees, self._updates):
            pending.fail_instance(instance, UnavailableError(why))
        self._note_idle()
