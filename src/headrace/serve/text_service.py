"""`TextService`: text to tokens and conversations to text, none of it on the event loop.

encode, decode ──> a thread; long texts have one of their own, so that short ones need not wait for them
chat ──> the template, in a worker process ──> a thread
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from headrace.errors import RequestError
from headrace.serve.errors import RefusedError, named
from headrace.serve.templates import TemplateWorker
from headrace.text.tokenizer import Tokenizer

__all__ = ["TextService", "TokenizedPrompt", "several"]

LONG = 20_000
"""Characters or tokens from which a text is long: some 10 ms of work."""
RESERVED = frozenset({"messages", "add_generation_prompt", "tools", "documents", "self"})
"""Variables of a template that are not the caller's to set."""
T = TypeVar("T")


def several(given: Any) -> list[Any]:
    """The prompts of a field that is a text, ids, or a list of either."""
    return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the engine takes it. `text` is None where it came as token ids."""

    text: str | None
    token_ids: list[int]

    def last(self, count: int) -> TokenizedPrompt:
        """The last `count` tokens of it."""
        return self if len(self.token_ids) <= count else TokenizedPrompt(None, self.token_ids[-count:] if count else [])


class TextService:
    """One tokenizer and its chat template, for many requests. Close it at the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._short, self._long = ThreadPoolExecutor(1, "text"), ThreadPoolExecutor(1, "long-text")
        self._own, self._guests = TemplateWorker(), TemplateWorker()
        """Templates of requests run apart, so that they can hold up nobody else's."""

    async def start(self) -> None:
        """Make ready for the first conversation."""
        if self.tokenizer.has_chat_template:
            await self._own.start()

    async def close(self) -> None:
        """End threads and processes."""
        self._short.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)
        await self._own.close()
        await self._guests.close()

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text. `RefusedError` where it is not valid Unicode."""
        return await self._off_loop(len(text), lambda: self.tokenizer.encode(text, add_special_tokens))

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return await self._off_loop(len(ids), lambda: self.tokenizer.decode(ids, skip_special_tokens=False))

    async def token_texts(self, ids: Sequence[int]) -> list[str]:
        """What each token adds in the middle of a text."""

        def work() -> list[str]:
            known = {i: self.tokenizer.token_text(i) for i in set(ids)}
            return [known[i] for i in ids]

        return await self._off_loop(16 * len(ids), work)

    async def prompts(self, given: Sequence[str | list[int]], add_special_tokens: bool) -> list[TokenizedPrompt]:
        """Prompts of texts or ids."""
        return [
            TokenizedPrompt(one, await self.encode(one, add_special_tokens))
            if isinstance(one, str)
            else TokenizedPrompt(None, one)
            for one in given
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
        """A conversation as a prompt. `variables` are the template's, each with the field that it came in."""
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
        worker = self._own if chat_template is None else self._guests
        text = await worker.render(
            {
                "source": source,
                "special": dict(self.tokenizer.special_tokens),
                "messages": plain,
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
                "variables": variables,
            }
        )
        if mark:
            text = _cut(text, mark)
        return TokenizedPrompt(text, await self.encode(text, add_special_tokens))

    async def _off_loop(self, size: int, work: Callable[[], T]) -> T:
        pool = self._short if size < LONG else self._long
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except RequestError as error:
            raise named(error) from None


def _flat(message: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Content that is a list of text parts becomes one text, which is what templates expect."""
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
    """Put a mark at the end of the last message, which no template can have of itself; returns it."""
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
