"""`Answers`: answers generation requests, streamed or whole, for completions and chats alike.

open one stream a prompt ──> deltas ──> parts ──> a form's choices ──> chunks, or one answer at the end
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.errors import renamed_fields
from headrace.instance.wire import Delta, Explanation
from headrace.llm.outputs import CompletionOutput, RequestOutput
from headrace.serve.errors import RefusedError
from headrace.serve.gateway import Stream
from headrace.serve.http import JSON, EventStream, unless_gone
from headrace.serve.models import ServedModel
from headrace.serve.protocol.forms import Form, echo_part, own_entry, prompt_tables, usage
from headrace.serve.protocol.requests import GenerationRequest
from headrace.serve.text_service import TokenizedPrompt

__all__ = ["Answers"]


@dataclass(frozen=True)
class _Job:
    """One HTTP request while it is answered."""

    generation: GenerationRequest
    form: Form
    streams: Sequence[Stream]
    echoes: Sequence[tuple[str, str]]
    """For each prompt, its text and its first token's; empty where nothing is echoed."""
    head: Mapping[str, Any] = field(default_factory=dict)
    """The first fields of every chunk and answer."""

    @property
    def best(self) -> int:
        """Alternatives to show for each token."""
        return self.generation.logprobs or 0

    @property
    def weights_version(self) -> int:
        """Of the weights that computed the latest token of all streams."""
        return max(self.streams, key=lambda stream: stream.last_token or 0.0).output.weights_version

    def abandon(self) -> None:
        """Abort the streams that still run."""
        for stream in self.streams:
            stream.abandon()


class Answers:
    """Answers of one served model."""

    def __init__(self, model: ServedModel) -> None:
        self._gateway = model.gateway
        self._text = model.text
        self._model_name = model.name

    async def answer(
        self,
        request: Request,
        generation: GenerationRequest,
        form: Form,
        prompts: Sequence[TokenizedPrompt],
        echo: str | None = None,
    ) -> Response:
        """The response. Raises what `Gateway.open` raises, and `ClientGoneError`, before anything is sent.

        `echo` is the text to begin with, where it is not the prompt's own.
        """
        identity = form.prefix + (generation.request_id or request.state.request_id)
        job = await unless_gone(request, self._open(generation, form, prompts, echo, identity))
        if generation.stream:
            return EventStream(self._chunks(job), job.abandon)
        try:
            outputs = await unless_gone(request, self._results(job))
        finally:
            job.abandon()
        return JSON(self._whole(job, outputs))

    def check(self, generation: GenerationRequest, count: int) -> None:
        """Refuse `count` prompts that cannot be served together, before any work is done for them."""
        if generation.explain and count > 1:
            raise RefusedError(f"explain is for one prompt, not {count}", "explain")
        seats = count * max(generation.params.n, generation.params.beam_width)
        if count > 1 and seats > self._gateway.seats:
            raise RefusedError(
                f"{count} prompts with n={generation.params.n} are {seats} sequences, and this server "
                f"holds {self._gateway.seats}: send fewer at a time",
                "prompt",
            )

    # ---- opening

    async def _open(
        self,
        generation: GenerationRequest,
        form: Form,
        prompts: Sequence[TokenizedPrompt],
        echo: str | None,
        identity: str,
    ) -> _Job:
        """Open a stream for every prompt, or for none if one fails or this is cancelled."""
        echoes = [await self._echo(generation, prompt, echo) for prompt in prompts] if generation.echo else []
        streams: list[Stream] = []
        try:
            for prompt in prompts:
                with renamed_fields({**generation.names, "prompt": prompt.place}):
                    stream = await self._gateway.open(
                        identity,
                        prompt.text,
                        prompt.token_ids,
                        generation.params,
                        priority=generation.priority,
                        cache_key=generation.cache_key,
                    )
                streams.append(stream)
        except BaseException:
            for stream in streams:
                stream.abandon()
            raise
        head = {
            "id": identity,
            "object": form.chunk_object if generation.stream else form.object,
            "created": int(time.time()),
            "model": self._model_name,
            "system_fingerprint": self._gateway.info.fingerprint,
        }
        return _Job(generation, form, streams, echoes, head)

    async def _echo(self, generation: GenerationRequest, prompt: TokenizedPrompt, echo: str | None) -> tuple[str, str]:
        text = echo if echo is not None else prompt.text
        if text is None:
            text = await self._text.decode(prompt.token_ids)
        first = prompt.token_ids[:1] if generation.logprobs is not None else []
        return text, "".join(await self._text.token_texts(first))

    # ---- one answer at the end

    async def _results(self, job: _Job) -> list[RequestOutput]:
        return [await stream.result() for stream in job.streams]

    def _whole(self, job: _Job, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = []
        for i, output in enumerate(outputs):
            for choice in output.outputs:
                part = CompletionOutput(0, finish_reason="length") if job.generation.only_echo else choice
                if job.echoes:
                    part = _echoed(job, i, part)
                shape = job.form.answer_choice(i * len(output.outputs) + choice.index, part, job.best)
                if job.generation.token_ids:
                    shape |= {
                        "token_ids": [] if job.generation.only_echo else choice.token_ids,
                        "prompt_token_ids": output.prompt_token_ids,
                    }
                if job.generation.prompt_tables:
                    shape["prompt_logprobs"] = prompt_tables(output)
                choices.append(shape)
        generated = 0 if job.generation.only_echo else sum(len(c.token_ids) for o in outputs for c in o.outputs)
        spent = usage(_prompt_tokens(job), generated, sum(output.num_cached_tokens for output in outputs))
        answer = {**job.head, "weights_version": job.weights_version, "choices": choices, "usage": spent}
        if job.generation.explain:
            answer["explanation"] = _explanation(job.streams[0])
        return answer

    # ---- a chunk at a time

    async def _chunks(self, job: _Job) -> AsyncIterator[list[Mapping[str, Any]]]:
        """Chunks; those of one delta are in one list."""
        chunker = _Chunker(job)
        opening = chunker.opening()
        if opening:
            yield opening
        async for i, delta in _merged(job.streams):
            chunks = chunker.chunks(i, delta)
            if chunks:
                yield chunks
        if job.generation.include_usage:
            yield [{**job.head, "weights_version": job.weights_version, "choices": [], "usage": chunker.usage()}]


class _Chunker:
    """Turns deltas into chunks; keeps the progress of each choice."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        count = len(job.streams) * job.generation.params.n
        self._offsets = [0] * count
        """Characters of each choice's tokens so far: `text_offset` of the next."""
        self._begun = [False] * count
        self._generated = 0
        self._cached = [0] * len(job.streams)
        self._held: list[list[Delta]] = [[] for _ in job.streams]

    def opening(self) -> list[Mapping[str, Any]]:
        """The chunks before any token: a chat's role."""
        shapes = [self._job.form.opening_choice(i) for i in range(len(self._offsets))]
        version = self._job.weights_version
        return [self._chunk(shape, version) for shape in shapes if shape is not None]

    def chunks(self, i: int, delta: Delta) -> list[Mapping[str, Any]]:
        """Chunks of a delta of prompt `i`. An echo's log-probabilities come first: deltas wait for them."""
        self._held[i].append(delta)
        if not self._can_echo(i):
            return []
        held, self._held[i] = self._held[i], []
        chunks: list[Mapping[str, Any]] = []
        for each in held:
            self._cached[i] = each.output.num_cached_tokens
            shapes = [shape for new in each.output.outputs if (shape := self._shape(i, new)) is not None]
            chunks += [self._chunk(shape, each.output.weights_version) for shape in shapes]
        if delta.output.finished and self._job.generation.explain and chunks:
            chunks[-1] = {**chunks[-1], "explanation": _explanation(self._job.streams[0])}
        return chunks

    def _can_echo(self, i: int) -> bool:
        """Whether the prompt's log-probabilities are complete: a choice with a cached prefix may be ahead of them."""
        output = self._job.streams[i].output
        known = output.prompt_logprobs
        return not self._job.echoes or known is None or output.finished or len(known) >= len(output.prompt_token_ids)

    def _shape(self, i: int, part: CompletionOutput) -> dict[str, Any] | None:
        """The choice of a chunk; None where it would be empty."""
        job, index = self._job, i * self._job.generation.params.n + part.index
        if job.generation.only_echo:
            part = CompletionOutput(0, finish_reason=part.finish_reason)
        self._generated += len(part.token_ids)
        token_ids, first = part.token_ids, not self._begun[index]
        self._begun[index] = True
        if first and job.echoes:
            part = _echoed(job, i, part)
        if not (part.text or part.finish_reason or part.logprobs or (job.generation.token_ids and token_ids)):
            return None
        shape = job.form.chunk_choice(index, part, job.best, self._offsets[index])
        for table in part.logprobs or ():
            self._offsets[index] += len(own_entry(table).decoded_token)
        if job.generation.token_ids:
            shape["token_ids"] = token_ids
            if first:
                shape["prompt_token_ids"] = job.streams[i].output.prompt_token_ids
        return shape

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return usage(_prompt_tokens(self._job), self._generated, sum(self._cached))

    def _chunk(self, shape: Mapping[str, Any], version: int) -> dict[str, Any]:
        generation = self._job.generation
        chunk: dict[str, Any] = {**self._job.head, "weights_version": version, "choices": [shape]}
        if generation.continuous_usage:
            chunk["usage"] = self.usage()
        elif generation.include_usage:
            chunk["usage"] = None
        return chunk


def _echoed(job: _Job, i: int, part: CompletionOutput) -> CompletionOutput:
    """The first part of a choice of prompt `i`, after the prompt."""
    text, first = job.echoes[i]
    shown = job.generation.logprobs is not None and job.form.echoes_logprobs
    whole = echo_part(text, job.streams[i].output, first, shown)
    whole.extend(part)
    return whole


def _prompt_tokens(job: _Job) -> int:
    return sum(len(stream.output.prompt_token_ids) for stream in job.streams)


def _explanation(stream: Stream) -> dict[str, Any]:
    """Every field, also those with default values."""
    return {name: getattr(stream.explanation, name) for name in Explanation.__struct_fields__}


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Delta]]:
    """(Index of the stream, delta) of all streams, as they come. Raises the first error of any."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                try:
                    delta = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[i]))] = i
                yield i, delta
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
