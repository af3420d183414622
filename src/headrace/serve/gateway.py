"""`Gateway`: requests in, deltas out, over an instance process that may die and come back.

It keeps every unfinished request's transcript, so that a new instance can go on. It knows nothing of HTTP.

    start ──> ready ──(the instance dies)──> restarting ──> ready, each transcript sent again
                └──> draining ──> stopped          └──> failed: every stream gets an error
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from headrace.cache.key import CacheKey
from headrace.config import require
from headrace.engine.schedule.sampling import MAX_LOGPROBS, SamplingParams
from headrace.errors import HeadraceError
from headrace.instance.client import InstanceClient, InstanceDiedError
from headrace.instance.wire import (
    Abort,
    Accepted,
    Batch,
    Command,
    Delta,
    Embed,
    Embedding,
    Inspect,
    Ready,
    Refused,
    StepReport,
    Tree,
    Update,
    Updated,
    Weights,
    encode,
)
from headrace.llm.options import EngineOptions
from headrace.llm.records import ResumeRecord
from headrace.serve.errors import QueueFullError, RefusedError, UnavailableError
from headrace.serve.observer import GatewayObserver
from headrace.serve.questions import Questions
from headrace.serve.stream import ReportFeed, Stream
from headrace.serve.transcript import Transcript

__all__ = ["Gateway", "GatewayObserver", "QueueFullError", "RefusedError", "Stream", "UnavailableError"]

BARREN_DROP, BARREN_GIVE_UP = 3, 6
"""Lives in a row in which nothing was served: one request may be the killer, so drop them; then give up."""
BACKOFF, LONG_LIFE = 0.2, 60.0
"""Seconds: before a new start; after which a life that served nothing was merely idle."""


class Gateway:
    """One model, one instance, many requests."""

    info: Ready
    """Of the newest instance."""

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
        """`options` are fields of `EngineOptions`, as JSON has them; `ConfigError` if they cannot work.

        `max_queue` counts sequences beyond the engine's `max_num_seqs`. `progress(done, total, kernel)` is called
        while kernels are made ready.
        """
        require(0 <= max_logprobs <= MAX_LOGPROBS, f"max_logprobs={max_logprobs} must be from 0 to {MAX_LOGPROBS}")
        require(max_queue >= 0, f"max_queue={max_queue} must not be negative")
        self.max_num_seqs = EngineOptions(**options).max_num_seqs
        self.max_queue = max_queue
        self.observer = observer
        self.report: StepReport | None = None
        """The latest step's."""
        self.restarts = 0
        self._weights: Weights | None = None
        """What was put in last, over the model's own."""
        self._start = lambda: InstanceClient.start(model, options, progress, self._weights)
        self._restart = restart
        self._max_logprobs = max_logprobs
        self._state = "starting"
        self._draining = False
        self._client: InstanceClient | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._names = itertools.count(1)
        self._streams: dict[str, Stream] = {}
        self._embeds: Questions[Embed, Embedding] = Questions()
        self._trees: Questions[Inspect, Tree] = Questions()
        self._updates: Questions[Update, int] = Questions()
        self._feeds: set[ReportFeed] = set()
        self._idle: asyncio.Event = asyncio.Event()
        self._ends: deque[float] = deque([time.monotonic()], maxlen=33)
        """When the latest requests ended."""
        self._barren = 0

    # ---- its own life

    @property
    def state(self) -> str:
        """ "starting", "ready", "restarting", "draining", "failed" or "stopped"."""
        return "draining" if self._draining and self._state in ("ready", "restarting") else self._state

    async def start(self) -> None:
        """Until the model is loaded. `HeadraceError` where the user is at fault, `InstanceDiedError` where not."""
        try:
            self._take_over(await self._start())
        except BaseException:
            self._state = "failed"
            raise
        self._supervisor = asyncio.create_task(self._supervise())

    async def drain(self, timeout: float) -> None:
        """Take no new requests, give the running ones `timeout` seconds, then stop."""
        self._draining = True
        self._note_idle()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        await self.stop()

    async def stop(self) -> None:
        """End the instance; requests that still run get an `UnavailableError`. May be called again."""
        self._state = "stopped"
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        self._fail_all("the server is stopping")
        client, self._client = self._client, None
        if client is not None:
            await client.stop()
        for feed in self._feeds:
            feed.close()

    # ---- what callers ask for

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
        """Queue a request; returns when the instance has taken it. While an instance restarts, it waits for it.

        Every request without a seed is given one. Raises `RefusedError` where it can never be served,
        `QueueFullError` where too many wait, `UnavailableError` where no instance is, or will be.
        """
        self._check(params)
        self._make_room(max(params.n, params.beam_width))
        wire = str(next(self._names))
        transcript = Transcript(wire, ResumeRecord.begin(name, prompt, prompt_token_ids, params, priority, cache_key))
        transcript.output.weights_version = self.weights_version
        stream = Stream(transcript, self._leave)
        self._streams[wire] = stream
        if self.observer is not None:
            self.observer.arrived(name, len(prompt_token_ids))
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
        wire = str(next(self._names))
        embed = Embed(wire, prompt_token_ids)
        answer = self._embeds.ask(wire, embed)
        if self.observer is not None:
            self.observer.arrived(name, len(prompt_token_ids))
        try:
            self._send(embed)
            return await answer
        finally:
            if self._embeds.withdraw(wire):
                self._send(Abort(wire))
            self._note_idle()

    async def update_weights(self, folder: str, version: int | None = None) -> int:
        """Put a folder's weights into the engine, between two steps; returns their version (None: the next one).

        Requests that run go on under them, and so does an engine that comes after this one. Raises `RefusedError`
        where they do not fit, `UnavailableError` where no engine is ready or it dies: then nothing has changed.
        """
        if self.state != "ready":
            raise UnavailableError(f"the engine is {self.state}")
        wire = str(next(self._names))
        update = Update(wire, folder, version)
        self._send(update)
        return await self._updates.ask(wire, update)

    async def inspect(self, max_nodes: int = 500) -> Tree:
        """The radix tree of the prefix cache. `UnavailableError` where no instance is ready."""
        if self._state != "ready":
            raise UnavailableError(f"the engine is {self.state}")
        inspect = Inspect(max_nodes)
        self._send(inspect)
        return await self._trees.ask(str(next(self._names)), inspect)

    async def reports(self) -> AsyncIterator[StepReport]:
        """Step reports from now on, until the gateway stops; a slow reader misses some, and delays nobody."""
        feed = ReportFeed()
        self._feeds.add(feed)
        try:
            async for report in feed:
                yield report
        finally:
            self._feeds.discard(feed)

    @property
    def weights_version(self) -> int:
        """Of the weights that the engine has."""
        return self.info.weights_version if self._weights is None else self._weights.version

    @property
    def seats(self) -> int:
        """Sequences that may run or wait at once."""
        return self.max_num_seqs + self.max_queue

    @property
    def unfinished(self) -> int:
        """Sequences that run or wait."""
        return sum(stream.transcript.seats for stream in self._streams.values()) + len(self._embeds)

    def _check(self, params: SamplingParams) -> None:
        for field in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, field)
            if asked is not None and asked > self._max_logprobs:
                raise RefusedError(f"{field}={asked} is more than this server's limit of {self._max_logprobs}", field)

    def _make_room(self, seats: int) -> None:
        """Refuse what would wait too long. A request that is alone is never refused for its size."""
        if self.state not in ("ready", "restarting"):
            raise UnavailableError(f"the engine is {self.state}")
        taken = self.unfinished
        if taken and taken + seats > self.seats:
            span = time.monotonic() - self._ends[0]
            wait = math.ceil(span / len(self._ends))
            raise QueueFullError(max(0, taken - self.max_num_seqs), min(max(wait, 1), 60))

    def _submit(self, stream: Stream) -> None:
        try:
            self._send(stream.transcript.command(self.info.fingerprint))
        except RefusedError as error:
            self._refuse(Refused(stream.transcript.wire_name, str(error)))

    def _send(self, command: Command) -> None:
        """Send a command, unless no instance is ready: the next one is sent what matters to it."""
        try:
            if self._state == "ready" and self._client is not None:
                self._client.send(command)
            else:
                encode(command)
        except (UnicodeError, OverflowError) as error:
            raise RefusedError(f"the request holds what cannot be sent: {error}") from None

    def _leave(self, stream: Stream) -> None:
        """Its caller is gone."""
        if self._streams.pop(stream.transcript.wire_name, None) is not None:
            self._send(Abort(stream.transcript.wire_name))
            stream.end()
            self._note_end(stream, "abort")

    # ---- what the instance says

    def _hear(self, batch: Batch) -> None:
        now = time.monotonic()
        for news in batch.news:
            if isinstance(news, Delta):
                self._barren = 0
                self._take(news, now)
            elif isinstance(news, StepReport):
                self._tell(news)
            elif isinstance(news, Accepted):
                if news.name in self._streams:
                    self._streams[news.name].accept()
            elif isinstance(news, Refused):
                self._refuse(news)
            elif isinstance(news, Embedding):
                self._barren = 0
                self._embeds.answer(news.name, news)
            elif isinstance(news, Updated):
                self._barren, self._weights = 0, news.weights
                self._updates.answer(news.name, news.weights.version)
            else:
                self._trees.answer(self._trees.oldest, news)

    def _take(self, delta: Delta, now: float) -> None:
        stream = self._streams.get(delta.name)
        if stream is None:  # its client left meanwhile
            return
        if delta.explanation is not None:
            delta.explanation.resumes = stream.resumes
        stream.take(delta)
        if any(choice.token_ids for choice in delta.choices):
            if self.observer is not None and stream.last_token is None:
                self.observer.first_token(stream.name, now - stream.opened)
            elif self.observer is not None and stream.last_token is not None:
                self.observer.token_gap(stream.name, now - stream.last_token)
            stream.last_token = now
        if delta.finished:
            del self._streams[delta.name]
            self._note_end(stream, str(stream.output.outputs[0].finish_reason))

    def _tell(self, report: StepReport) -> None:
        self.report = report
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
            stream.fail(RefusedError(refused.message, refused.param))
            self._note_end(stream, "refused")
        else:
            error = RefusedError(refused.message, refused.param)
            self._embeds.fail(refused.name, error)
            self._updates.fail(refused.name, error)

    def _note_end(self, stream: Stream, reason: str) -> None:
        now = time.monotonic()
        self._ends.append(now)
        if self.observer is not None:
            seconds = now - stream.opened
            self.observer.finished(stream.name, reason, stream.output, stream.explanation, seconds)
        self._note_idle()

    def _note_idle(self) -> None:
        if self._streams or self._embeds:
            self._idle.clear()
        else:
            self._idle.set()

    # ---- death and what follows

    async def _supervise(self) -> None:
        """Hear the instance; when it dies, start another. Ends when none will come."""
        try:
            while self._client is not None:
                began = time.monotonic()
                why = await self._listen(self._client)
                await self._client.kill()
                self._client = None
                self._bury(why, time.monotonic() - began)
                if self._state == "restarting":
                    await self._revive()
        except Exception as error:
            self._give_up(f"the gateway failed: {error!r}")
            raise

    async def _listen(self, client: InstanceClient) -> str:
        try:
            async for batch in client.batches():
                self._hear(batch)
        except InstanceDiedError as error:
            return f"the engine failed: {error}"
        return "the engine's process died"

    def _bury(self, why: str, lived: float) -> None:
        """An instance is gone: decide what becomes of those who wait for it."""
        self._barren = 0 if lived > LONG_LIFE else self._barren + 1
        self._trees.fail_all(UnavailableError(why))
        self._updates.fail_all(UnavailableError(f"{why}, and its weights are those of before"))
        if not self._restart:
            self._give_up(why)
        elif self._barren >= BARREN_GIVE_UP:
            self._give_up(f"{why}, {self._barren} times in a row")
        else:
            print(f"headrace: {why}; starting another", file=sys.stderr)
            self._state = "restarting"
            if self._barren >= BARREN_DROP:
                self._fail_all(f"{why} {self._barren} times in a row")

    async def _revive(self) -> None:
        while self._state == "restarting":
            if self._barren > 1:
                await asyncio.sleep(BACKOFF * 2**self._barren)
            began = time.monotonic()
            try:
                client = await self._start()
            except HeadraceError as error:
                self._give_up(f"the engine cannot start again: {error}")
            except (InstanceDiedError, OSError) as error:
                self._bury(str(error), time.monotonic() - began)
            else:
                self._resume(client)

    def _take_over(self, client: InstanceClient) -> None:
        self._client, self.info, self._state = client, client.ready, "ready"

    def _resume(self, client: InstanceClient) -> None:
        """Send every unfinished request to a new instance, in the order they came."""
        before = self.info.fingerprint
        self._take_over(client)
        self.restarts += 1
        if before != self.info.fingerprint:
            self._fail_all(f"the new engine is {self.info.fingerprint}, not {before}: its tokens could differ")
        for stream in list(self._streams.values()):
            stream.resumes += stream.accepted
            self._submit(stream)
        for embed in self._embeds.commands:
            self._send(embed)
        if self.observer is not None:
            self.observer.restarted()

    def _give_up(self, why: str) -> None:
        print(f"headrace: {why}; no other is started", file=sys.stderr)
        self._state = "failed"
        self._fail_all(why)

    def _fail_all(self, why: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(UnavailableError(why))
            self._note_end(stream, "error")
        for questions in (self._embeds, self._trees, self._updates):
            questions.fail_all(UnavailableError(why))
        self._note_idle()
