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

    def last(self, count: int) -> TokenizedPrompt:
        """The last `count` tokens."""
        if len(self.token_ids) <= count:
            return self
        return TokenizedPrompt(None, self.token_ids[-count:] if count else [], self.place)


class TextService:
    """One tokenizer and its chat template, for concurrent requests. Must be closed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._short, self._long = ThreadPoolExecutor(1, "text"), ThreadPoolExecutor(1, "long-text")
        self._model_templates, self._request_templates = TemplateWorker(), TemplateWorker()
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

    async def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, as in the middle of a longer text."""

        def work() -> list[str]:
            known = {i: self.tokenizer.token_text(i) for i in set(ids)}
            return [known[i] for i in ids]

        return await self._off_loop(16 * len(ids), work)

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

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        variables: Mapping[str, tuple[str, Any]] = {},
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
        plain = [_flat(message, i) for i, message in enumerate(messages)]
        mark = _mark(plain) if continue_final_message else ""
        worker = self._model_templates if chat_template is None else self._request_templates
        job = {
            "source": source,
            "special": dict(self.tokenizer.special_tokens),
            "messages": plain,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "variables": variables,
        }
        with renamed_fields({} if chat_template is not None else {"chat_template": "messages"}):
            text = await worker.render(job)
        if mark:
            text = _cut(text, mark)
        return TokenizedPrompt(text, await self.encode(text, add_special_tokens, "messages"), "messages")

    async def _off_loop(self, size: int, work: Callable[[], T]) -> T:
        pool = self._short if size < LONG else self._long
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def _flat(message: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Join content that is a list of text parts into one text, as templates expect."""
    content = message.get("content")
    if not isinstance(content, list):
        if content is not None and not isinstance(content, str):
            raise RefusedError(f"messages[{i}].content must be text or a list of text parts", "messages")
        return dict(message)
    parts = []
    for j, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RefusedError(f"messages[{i}].content[{j}] is not a text part, and only text is served", "messages")
        parts.append(text)
    return {**message, "content": "\n".join(parts)}


def _mark(messages: list[dict[str, Any]]) -> str:
    """Append a random marker to the last message, so that its end can be found in the rendered text; returns it."""
    last = messages[-1]
    if not isinstance(last.get("content"), str):
        raise RefusedError("continue_final_message needs a last message with text", "continue_final_message")
    mark = secrets.token_hex(16)
    messages[-1] = {**last, "content": last["content"] + mark}
    return mark


def _cut(text: str, mark: str) -> str:
    if text.count(mark) != 1:
        raise RefusedError(
            "continue_final_message: the chat template does not write the last message as it is",
            "continue_final_message",
        )
    return text[: text.index(mark)]
