"""The open-loop load generator: it sends requests at the trace's times, without waiting for answers.

A closed-loop generator slows down with its server, and so hides the queue that it should measure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from headrace.bench.traces import Prompts, TraceRow
from headrace.bench.wire import Endpoint, WireError, post
from headrace.config import require
from headrace.errors import RequestError

__all__ = ["Call", "RequestRow", "Target", "find_model", "make_calls", "run_calls"]

PATH = "/v1/completions"
PROBE_SECONDS = 10.0
MESSAGE_CHARS = 200


@dataclass(frozen=True, slots=True)
class Call:
    """A request ready to be sent."""

    at: float
    """Seconds from the start."""
    body: bytes
    prompt_tokens: int
    max_tokens: int


@dataclass(slots=True)
class RequestRow:
    """The record of one request. Times are seconds from the start of the run."""

    scheduled: float
    prompt_tokens: int
    max_tokens: int
    sent: float | None = None
    tokens_at: list[float] = field(default_factory=list)
    """Times of the events with tokens; one event may have several tokens, depending on the server."""
    end: float | None = None
    output_tokens: int = 0
    failure: str | None = None
    """"HTTP 429", "connection", "broken stream", "timeout", "not sent"; None for a complete answer."""
    message: str = ""

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first token."""
        return self.tokens_at[0] - self.sent if self.tokens_at and self.sent is not None else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between successive events."""
        return [b - a for a, b in zip(self.tokens_at, self.tokens_at[1:])]

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None for an answer of one token."""
        return (self.tokens_at[-1] - self.tokens_at[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def latency(self) -> float | None:
        """Seconds from sending to the end."""
        return self.end - self.sent if self.end is not None and self.sent is not None else None


@dataclass(frozen=True, slots=True)
class Target:
    """The model to measure, and what its server says of it (headrace says both, vLLM the first)."""

    name: str
    max_model_len: int | None = None
    vocab_size: int | None = None


class _ChunkChoice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None

    @property
    def holds_token(self) -> bool:
        """Whether the chunk carries a token; an empty text is half a character."""
        return bool(self.text or self.token_ids or self.finish_reason is None)


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_ChunkChoice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


def find_model(url: str, key: str | None = None, model: str | None = None) -> Target:
    """`model`, or the first that the server lists. Raises `RequestError` if it is unreachable or refuses the key."""
    base = url.rstrip("/").removesuffix("/v1")
    Endpoint.of(base, PATH, key)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        # No proxy: the server is measured.
        with httpx.Client(timeout=PROBE_SECONDS, trust_env=False, headers=headers) as client:
            answer = client.get(f"{base}/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RequestError(f"{base} cannot be reached: {error}") from None
    if answer.status_code in (401, 403):
        raise RequestError(f"{base} refuses the key ({answer.status_code}): give --api-key or HEADRACE_API_KEY")
    try:
        cards = {str(card["id"]): card for card in answer.json()["data"]}
    except (ValueError, KeyError, TypeError):
        cards = {}
    name = model or next(iter(cards), None)
    if name is None:
        raise RequestError(f"{base} lists no model (/v1/models answers {answer.status_code}): give --model")
    return Target(name, *(_count(cards.get(name, {}).get(key)) for key in ("max_model_len", "vocab_size")))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def make_calls(
    plan: Sequence[tuple[float, TraceRow]], prompts: Prompts, model: str, token_events: bool = False
) -> list[Call]:
    """The requests of a schedule, encoded before the run, so that the generator spends no time on it.

    `token_events` asks for an event per token, by a field that headrace and vLLM know and others may refuse.
    """
    calls = []
    for number, (at, row) in enumerate(plan):
        ids, (_, output) = prompts.make(number, row), prompts.lengths(row)
        body: dict[str, Any] = {
            "model": model,
            "prompt": ids,
            "max_tokens": output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if token_events:
            body["return_token_ids"] = True
        calls.append(Call(at, json.dumps(body, separators=(",", ":")).encode(), len(ids), output))
    return calls


async def run_calls(url: str, calls: Sequence[Call], limit: float, key: str | None = None) -> list[RequestRow]:
    """Send all calls on time; those unfinished `limit` seconds after the start have failed."""
    require(limit > 0, f"the limit of {limit:g} s must be above 0")
    with _many_files(len(calls)):
        return await _LoadRun(Endpoint.of(url, PATH, key), calls).run(limit)


class _LoadRun:
    """The clock and the rows of one run."""

    def __init__(self, endpoint: Endpoint, calls: Sequence[Call]) -> None:
        self._endpoint = endpoint
        self._calls = calls
        self._rows = [RequestRow(call.at, call.prompt_tokens, call.max_tokens) for call in calls]
        self._start = 0.0

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def run(self, limit: float) -> list[RequestRow]:
        """The rows, in the order of the calls."""
        tasks: list[asyncio.Task[None]] = []
        self._start = time.perf_counter()
        try:
            async with asyncio.timeout(limit):
                for call, row in zip(self._calls, self._rows):
                    if (early := call.at - self._now()) > 0:
                        await asyncio.sleep(early)
                    tasks.append(asyncio.create_task(self._send(call, row)))
                if tasks:
                    await asyncio.wait(tasks)
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for row in self._rows:
            if row.end is None:
                row.failure, row.end = "not sent" if row.sent is None else "timeout", self._now()
        for task in tasks:
            if not task.cancelled():
                task.result()
        return self._rows

    async def _send(self, call: Call, row: RequestRow) -> None:
        """Send one request and read its answer; a failure is recorded in its row."""
        row.sent = self._now()
        kind = "connection"
        try:
            reply, writer = await post(self._endpoint, call.body)
            kind = "broken stream" if reply.status == 200 else f"HTTP {reply.status}"
            try:
                async with contextlib.aclosing(reply.pieces()) as pieces:
                    if reply.status == 200:
                        row.message = await self._read(pieces, row)
                    else:
                        row.message = await _message(pieces)
            finally:
                writer.close()
        except (OSError, WireError) as error:
            row.message = str(error)[:MESSAGE_CHARS] or type(error).__name__
        row.failure = kind if row.message else None
        row.end = self._now()

    async def _read(self, pieces: AsyncIterator[bytes], row: RequestRow) -> str:
        """Read an answer's events; returns what is wrong with it, or "". A complete answer ends with [DONE]."""
        rest = b""
        reported, last = None, 0.0
        async for piece in pieces:
            now = self._now()
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    if reported and not row.tokens_at:
                        row.tokens_at.append(last)  # tokens without text: the client saw them at the end
                    row.output_tokens = len(row.tokens_at) if reported is None else reported
                    return "" if row.tokens_at else "the answer had no token"
                try:
                    event = _decode(data)
                except msgspec.DecodeError as error:
                    return f"an event is not a completion: {error}"[:MESSAGE_CHARS]
                if event.error is not None:
                    return str(event.error)[:MESSAGE_CHARS]
                if event.usage is not None:
                    reported = event.usage.completion_tokens
                if event.choices:
                    last = now
                    if any(choice.holds_token for choice in event.choices):
                        row.tokens_at.append(now)
        return "the answer ended without [DONE]"


async def _message(pieces: AsyncIterator[bytes]) -> str:
    """The beginning of an error message; never empty."""
    body = b""
    async for piece in pieces:
        body += piece
        if len(body) > 1 << 16:
            break
    try:
        return str(json.loads(body)["error"]["message"])[:MESSAGE_CHARS] or "no reason given"
    except (ValueError, KeyError, TypeError):
        return body[:MESSAGE_CHARS].decode(errors="replace") or "no reason given"


@contextlib.contextmanager
def _many_files(count: int) -> Iterator[None]:
    """Raise the limit on open files: too few connections would look like the server's failures."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
