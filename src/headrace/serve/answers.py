"""`Answers`: answers generation requests, streamed or whole, for completions and chats alike.

open one stream a prompt ──> deltas ──> parts ──> a form's choices ──> chunks, or one answer at the end
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.errors import renamed_fields
from headrace.instance.wire import Delta, Explanation
from headrace.llm.outputs import CompletionOutput, Logprob, RequestOutput
from headrace.serve.errors import RefusedError
from headrace.serve.gateway import Stream
from headrace.serve.http import JSON, EventStream, unless_gone
from headrace.serve.models import ServedModel
from headrace.serve.protocol.forms import Form, prompt_tables, usage
from headrace.serve.protocol.logprobs import PlacedToken, TokenQueue, TokenShapes
from headrace.serve.protocol.message import MessagePart, MessageReader, ReasoningCounter
from headrace.serve.protocol.requests import GenerationRequest
from headrace.serve.text_service import TokenizedPrompt
from headrace.text.places import TokenPlace
from headrace.text.tokenizer import Tokenizer

__all__ = ["Answers"]


@dataclass(frozen=True)
class _Echo:
    """A prompt's text, which an answer begins with."""

    text: str
    places: Sequence[TokenPlace] = ()
    """Of each token in it, where their log-probabilities are shown."""


@dataclass(frozen=True)
class _Job:
    """One HTTP request while it is answered."""

    generation: GenerationRequest
    form: Form
    streams: Sequence[Stream]
    echoes: Sequence[_Echo]
    """Of each prompt; empty where nothing is echoed."""
    tokenizer: Tokenizer
    head: Mapping[str, Any] = field(default_factory=dict)
    """The first fields of every chunk and answer."""

    @property
    def shapes(self) -> TokenShapes:
        """How tokens are written beside their log-probabilities."""
        return TokenShapes(self.tokenizer, self.generation.logprobs or 0, self.generation.tokens_as_ids)

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
        echoes = [await self._echo(generation, form, prompt, echo) for prompt in prompts] if generation.echo else []
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
            "service_tier": None,
            "system_fingerprint": self._gateway.info.fingerprint,
        }
        return _Job(generation, form, streams, echoes, self._text.tokenizer, head)

    async def _echo(
        self, generation: GenerationRequest, form: Form, prompt: TokenizedPrompt, echo: str | None
    ) -> _Echo:
        text = echo if echo is not None else prompt.text
        if text is not None and (generation.logprobs is None or not form.echoes_logprobs):
            return _Echo(text)
        return _Echo(*await self._text.placed(prompt, goes_on=not generation.only_echo))

    # ---- one answer at the end

    async def _results(self, job: _Job) -> list[RequestOutput]:
        return [await stream.result() for stream in job.streams]

    def _whole(self, job: _Job, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        generation, form = job.generation, job.form
        choices, texts, on_top = [], list[_ChoiceText](), {}
        for i, output in enumerate(outputs):
            of_prompt = {
                "prompt_logprobs": prompt_tables(output) if generation.prompt_tables else None,
                "prompt_token_ids": output.prompt_token_ids if generation.token_ids else None,
            }
            for choice in output.outputs:
                part = CompletionOutput(0, finish_reason="length") if generation.only_echo else choice
                text = _ChoiceText(job, i, choice.index)
                texts.append(text)
                part, message, tokens = text.take(part)
                self._gateway.called(job.streams[i], text.calls)
                logprobs = None if text.queue is None else form.logprobs(job.shapes, tokens)
                shape = form.answer_choice(i * len(output.outputs) + choice.index, part, message, logprobs)
                shape["token_ids"] = None
                if generation.token_ids:
                    shape["token_ids"] = [] if generation.only_echo else choice.token_ids
                if generation.explain:
                    shape["accepted_drafts"] = part.accepted
                choices.append(shape if form.prompt_on_top else shape | of_prompt)
            on_top = of_prompt if form.prompt_on_top else {}
        generated = 0 if generation.only_echo else sum(len(c.token_ids) for o in outputs for c in o.outputs)
        spent = _usage(job, generated, outputs, texts)
        answer = {**job.head, "weights_version": job.weights_version, "choices": choices, "usage": spent}
        answer |= {"kv_transfer_params": None, **on_top}
        if generation.explain:
            answer["explanation"] = _explanation(job.streams[0])
        return answer

    # ---- a chunk at a time

    async def _chunks(self, job: _Job) -> AsyncIterator[list[Mapping[str, Any]]]:
        """Chunks; those of one delta are in one list."""
        chunker = _Chunker(job, self._gateway.called)
        opening = chunker.opening()
        if opening:
            yield opening
        async for i, delta in _merged(job.streams):
            chunks = chunker.chunks(i, delta)
            if chunks:
                yield chunks
        if job.generation.include_usage:
            yield [{**job.head, "weights_version": job.weights_version, "choices": [], "usage": chunker.usage()}]


class _ChoiceText:
    """A choice of prompt `i` as it is returned: after the echo, with tokens that wait for their text."""

    def __init__(self, job: _Job, i: int, choice: int) -> None:
        generation = job.generation
        seed = f"{job.head.get('id')}/{i}/{choice}"
        self._message = MessageReader(generation.shape, seed, generation.begun, generation.include_reasoning)
        self._echo = job.echoes[i] if job.echoes else None
        self._output = job.streams[i].output
        self._job = job
        self._tokenizer = job.tokenizer
        self.queue: TokenQueue | None = None
        """Where log-probabilities are shown, once the text has begun."""
        self._echoed = 0
        """Tokens of the echo, which come with the first part."""
        self._reasoning: ReasoningCounter | None = None
        if generation.shape is not None and generation.shape.reasoning is not None:
            ids, shown = self._output.prompt_token_ids, generation.params.shown_special_ids
            text = job.tokenizer.detokenizer(True, ids, shown)
            begun = generation.begun if self._echo is None else self._echo.text
            self._reasoning = ReasoningCounter(text, generation.shape.reasoning == "begun", begun)
        self.begun = False

    @property
    def calls(self) -> int:
        """Calls of tools so far."""
        return self._message.calls

    def take(self, part: CompletionOutput) -> tuple[CompletionOutput, MessagePart, list[PlacedToken]]:
        """Add a part; returns it as it is to be sent, what its text says, and the tokens to send with it."""
        if not self.begun:
            self.begun = True
            if self._job.generation.logprobs is not None:
                self.queue = self._new_queue()
            if self._echo is not None:
                part = replace(part, text=self._echo.text + part.text)
        if self._reasoning is not None:
            self._reasoning.take(part.token_ids)
        message = self._message.take(part.text, part.finish_reason is not None)
        sent = replace(part, finish_reason=self._message.finish_reason(part.finish_reason))
        if part.finish_reason == "error":
            sent = replace(sent, stop_reason=_with_names(str(part.stop_reason), self._job.generation.names))
        if self.queue is None:
            return sent, message, []
        tokens = self.queue.take(part)
        echoed, self._echoed = self._echoed, 0
        return replace(sent, token_ids=[token.token_id for token in tokens[echoed:]]), message, tokens

    @property
    def reasoning_tokens(self) -> int | None:
        """Of its tokens so far; None where reasoning is not told apart."""
        return None if self._reasoning is None else self._reasoning.count

    def _new_queue(self) -> TokenQueue:
        ids, params = self._output.prompt_token_ids, self._job.generation.params
        echo = self._echo or _Echo("")
        prompt = self._prompt_tokens(echo)
        self._echoed = len(prompt)
        text = self._tokenizer.detokenizer(params.skip_special_tokens, ids, params.shown_special_ids)
        return TokenQueue(text, echo.text, prompt)

    def _prompt_tokens(self, echo: _Echo) -> list[PlacedToken]:
        """The tokens of the echo. The first one is not predicted: its rank is 0."""
        tables: list[Mapping[int, Logprob]] = [
            {token: Logprob(0.0, 0, self._tokenizer.token_text(token))} for token in self._output.prompt_token_ids[:1]
        ]
        tables += [table for table in self._output.prompt_logprobs or () if table is not None]
        return [PlacedToken(table, place) for table, place in zip(tables, echo.places)]


class _Chunker:
    """Turns deltas into chunks; keeps the progress of each choice."""

    def __init__(self, job: _Job, called: Callable[[Stream, int], None]) -> None:
        """`called` is told how many tools a choice of a stream has called, when it ends."""
        self._job = job
        self._called = called
        indices = range(job.generation.params.n)
        self._choices = [_ChoiceText(job, i, choice) for i in range(len(job.streams)) for choice in indices]
        self._shapes = job.shapes
        self._generated = 0
        self._latest: dict[int, RequestOutput] = {}
        """The latest part of each prompt: it has the counts so far."""
        self._held: list[list[Delta]] = [[] for _ in job.streams]

    def opening(self) -> list[Mapping[str, Any]]:
        """The chunks before any token: a chat's role, and in the first one what is said of its prompt."""
        job, version = self._job, self._job.weights_version
        shapes = [job.form.opening_choice(i) for i in range(len(self._choices))]
        chunks = [self._chunk(shape, version) for shape in shapes if shape is not None]
        if chunks and job.generation.token_ids:
            chunks[0]["prompt_token_ids"] = job.streams[0].output.prompt_token_ids
        return list(chunks)

    def chunks(self, i: int, delta: Delta) -> list[Mapping[str, Any]]:
        """Chunks of a delta of prompt `i`. An echo's log-probabilities come first: deltas wait for them."""
        self._held[i].append(delta)
        if not self._can_echo(i):
            return []
        held, self._held[i] = self._held[i], []
        chunks: list[Mapping[str, Any]] = []
        for each in held:
            self._latest[i] = each.output
            shapes = [shape for new in each.output.outputs for shape in self._shapes_of(i, new)]
            chunks += [self._chunk(shape, each.output.weights_version) for shape in shapes]
        if delta.output.finished and self._job.generation.explain and chunks:
            chunks[-1] = {**chunks[-1], "explanation": _explanation(self._job.streams[0])}
        return chunks

    def _can_echo(self, i: int) -> bool:
        """Whether the prompt's log-probabilities are complete: a choice with a cached prefix may be ahead of them."""
        output = self._job.streams[i].output
        known = output.prompt_logprobs
        return not self._job.echoes or known is None or output.finished or len(known) >= len(output.prompt_token_ids)

    def _shapes_of(self, i: int, part: CompletionOutput) -> list[dict[str, Any]]:
        """The choice of a chunk, or of several: none where it would be empty."""
        job, index = self._job, i * self._job.generation.params.n + part.index
        if job.generation.only_echo:
            part = CompletionOutput(0, finish_reason=part.finish_reason)
        self._generated += len(part.token_ids)
        choice, first = self._choices[index], not self._choices[index].begun
        sent, message, tokens = choice.take(part)
        if sent.finish_reason is not None:
            self._called(job.streams[i], choice.calls)
        token_ids = sent.token_ids if job.generation.token_ids else []
        accepted = part.accepted if job.generation.explain else []
        if not (message or sent.finish_reason or tokens or token_ids or accepted):
            return []
        *before, last = message.one_call_each()
        bare = CompletionOutput(part.index)
        shapes = [job.form.chunk_choice(index, bare, one, None) for one in before]
        logprobs = None if choice.queue is None else job.form.logprobs(self._shapes, tokens)
        shape = job.form.chunk_choice(index, sent, last, logprobs)
        if job.generation.token_ids:
            shape["token_ids"] = token_ids
            if first and not job.form.prompt_on_top:
                shape["prompt_token_ids"] = job.streams[i].output.prompt_token_ids
        if job.generation.explain:
            shape["accepted_drafts"] = accepted
        return [*shapes, shape]

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return _usage(self._job, self._generated, self._latest.values(), self._choices)

    def _chunk(self, shape: Mapping[str, Any], version: int) -> dict[str, Any]:
        generation = self._job.generation
        chunk: dict[str, Any] = {**self._job.head, "weights_version": version, "choices": [shape]}
        if generation.continuous_usage:
            chunk["usage"] = self.usage()
        elif generation.include_usage:
            chunk["usage"] = None
        return chunk


def _with_names(reason: str, names: Mapping[str, str]) -> str:
    """Why a mask failed, with the request's names of the fields that it begins with."""
    fields, colon, why = reason.partition(": ")
    return ", ".join(names.get(name, name) for name in fields.split(", ")) + colon + why


def _reasoning(texts: Sequence[_ChoiceText]) -> int | None:
    counts = [text.reasoning_tokens for text in texts]
    return None if None in counts else sum(count or 0 for count in counts)


def _usage(
    job: _Job, generated: int, outputs: Collection[RequestOutput], texts: Sequence[_ChoiceText]
) -> dict[str, Any]:
    """The usage of what was answered so far. `outputs` are the prompts', or the latest part of each."""
    prompt = sum(len(stream.output.prompt_token_ids) for stream in job.streams)
    cached = sum(output.num_cached_tokens for output in outputs)
    drafts = sum(output.drafted_tokens for output in outputs), sum(output.accepted_tokens for output in outputs)
    return usage(prompt, generated, cached, _reasoning(texts), drafts if job.generation.predicted else None)


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
