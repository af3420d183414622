"""`TextService`: tokenizes texts and renders conversations, off the event loop.

encode, decode ──> a thread; long texts have their own, so that short ones do not wait for them
chat ──> the template, in a worker process ──> a thread
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from headrace.errors import renamed_fields
from headrace.serve.errors import RefusedError
from headrace.serve.templates import TemplateWorker
from headrace.text.messages import read_messages
from headrace.text.places import TokenPlace, places_of_ids, places_of_text
from headrace.text.tokenizer import Tokenizer

__all__ = ["TextService", "TokenizedPrompt", "several"]

LONG = 20_000
"""Characters or tokens from which a text is long: about 10 ms of work."""
RESERVED = frozenset({"messages", "add_generation_prompt", "tools", "documents", "self"})
"""Template variables that a request cannot set."""
T = TypeVar("T")


def several(given: Any) -> list[Any]:
    """The list of prompts of a field that is a text, token ids, or a list of either."""
    return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the engine takes it. `text` is None where it came as token ids."""

    text: str | None
    token_ids: list[int]
    place: str
    """In the request: a field, or one entry of it."""

    def cut(self, count: int, from_start: bool = False) -> TokenizedPrompt:
        """The last `count` tokens, or the first ones."""
        if len(self.token_ids) <= count:
            return self
        kept = self.token_ids[:count] if from_start else self.token_ids[len(self.token_ids) - count :]
        return TokenizedPrompt(None, kept, self.place)


class TextService:
    """One tokenizer and its chat template, for concurrent requests. Must be closed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._short, self._long = ThreadPoolExecutor(1, "text"), ThreadPoolExecutor(1, "long-text")
        self._model_templates, self._request_templates = TemplateWorker(field="messages"), TemplateWorker()
        """Templates sent with a request have a worker of their own, so that they cannot delay the model's."""

    async def start(self) -> None:
        """Start the worker of the model's template."""
        if self.tokenizer.has_chat_template:
            await self._model_templates.start()

    async def close(self) -> None:
        """End threads and processes."""
        self._short.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)
        await self._model_templates.close()
        await self._request_templates.close()

    async def encode(self, text: str, add_special_tokens: bool, place: str = "prompt") -> list[int]:
        """Token ids of a text. `RequestError`, which names its place in the request, if it is not valid Unicode."""
        with renamed_fields({"prompt": place}):
            return await self._off_loop(len(text), lambda: self.tokenizer.encode(text, add_special_tokens))

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return await self._off_loop(len(ids), lambda: self.tokenizer.decode(ids, skip_special_tokens=False))

    async def placed(self, prompt: TokenizedPrompt, goes_on: bool) -> tuple[str, list[TokenPlace]]:
        """The text of a prompt, after which a text `goes_on` or not, and where each of its tokens stands in it."""

        def work() -> tuple[str, list[TokenPlace]]:
            text, ids = prompt.text, prompt.token_ids
            if text is None:
                return places_of_ids(self.tokenizer, ids, goes_on)
            made, spans = self.tokenizer.encode_with_spans(text)
            if made != ids:  # the request asked for no special tokens
                _, spans = self.tokenizer.encode_with_spans(text, add_special_tokens=False)
            return text, places_of_text(self.tokenizer, text, ids, spans)

        return await self._off_loop(16 * len(prompt.token_ids), work)

    async def prompts(self, field: str, given: Any, add_special_tokens: bool) -> list[TokenizedPrompt]:
        """Tokenize the prompts of a field: a text, token ids, or a list of either."""
        many = several(given)
        places = [f"{field}[{i}]" for i in range(len(many))] if many is given else [field]
        return [
            TokenizedPrompt(one, await self.encode(one, add_special_tokens, place), place)
            if isinstance(one, str)
            else TokenizedPrompt(None, one, place)
            for place, one in zip(places, many)
        ]

    def template_source(self, chat_template: str | None = None) -> str:
        """The text of a request's chat template, or of all the model's."""
        if chat_template is not None or not self.tokenizer.has_chat_template:
            return chat_template or ""
        return "\n".join(self.tokenizer.chat_template.sources.values())

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        variables: Mapping[str, tuple[str, Any]] = {},
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_special_tokens: bool = False,
    ) -> TokenizedPrompt:
        """A conversation as a prompt. `variables` are the template's, each with the request field it came from."""
        for name, (field, _) in variables.items():
            if name in RESERVED:
                raise RefusedError(f"{field}: {name} is not a variable that can be set there", field)
        if chat_template is None:
            if not self.tokenizer.has_chat_template:
                raise RefusedError(
                    "this model has no chat template: send a plain prompt to /v1/completions, or a chat_template",
                    "messages",
                )
            source: Any = dict(self.tokenizer.chat_template.sources)
        else:
            source = chat_template
        messages, mark = _marked(messages) if continue_final_message else (messages, "")
        worker = self._model_templates if chat_template is None else self._request_templates
        text = await worker.render(
            {
                "source": source,
                "special": dict(self.tokenizer.special_tokens),
                "messages": messages,
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
                "variables": variables,
                "tools": tools,
            }
        )
        if mark:
            text = _cut(text, mark)
        return TokenizedPrompt(text, await self.encode(text, add_special_tokens, "messages"), "messages")

    async def _off_loop(self, size: int, work: Callable[[], T]) -> T:
        pool = self._short if size < LONG else self._long
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def _marked(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The messages, of which the last ends with a random marker, so that its end can be found in the rendered text."""
    *before, last = read_messages(messages)
    mark = secrets.token_hex(16)
    return [*before, {**last, "content": last["content"] + mark}], mark


def _cut(text: str, mark: str) -> str:
    if text.count(mark) != 1:
        raise RefusedError(
            "continue_final_message: the chat template does not write the last message as it is",
            "continue_final_message",
        )
    return text[: text.index(mark)]
