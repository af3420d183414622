"""The shapes of completions and chats: a part of a choice becomes a chunk's choice, a whole one an answer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from headrace.llm.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = ["CHAT_FORM", "COMPLETION_FORM", "Form", "echo_part", "own_entry", "prompt_tables", "usage"]


def echo_part(text: str, output: RequestOutput, first_token: str, shown: bool) -> CompletionOutput:
    """The prompt's text as the first part of a choice, with the prompt's log-probabilities if they are `shown`.

    `first_token` is the first token's text.
    """
    part = CompletionOutput(0, text)
    if shown and output.prompt_logprobs is not None:
        first = {output.prompt_token_ids[0]: Logprob(0.0, 0, first_token)}  # rank 0: the first token is not predicted
        part.logprobs = [first, *(table for table in output.prompt_logprobs if table is not None)]
    return part


def own_entry(table: Mapping[int, Logprob]) -> Logprob:
    """Of the sampled or scored token, which comes first."""
    return next(iter(table.values()))


def prompt_tables(output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """`prompt_logprobs` as vLLM sends them: token id to its entry."""
    if output.prompt_logprobs is None:
        return None
    return [
        None if table is None else {str(token): entry._asdict() for token, entry in table.items()}
        for table in output.prompt_logprobs
    ]


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """A `usage` object. All in tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Form(Protocol):
    """The shape of one endpoint's answers."""

    prefix: str
    """Of answers' ids."""
    object: str
    chunk_object: str
    echoes_logprobs: bool
    """Whether an echo includes the prompt's log-probabilities."""

    def opening_choice(self, index: int) -> dict[str, Any] | None:
        """The choice of a stream's first chunk, if there is one before any token."""

    def chunk_choice(self, index: int, part: CompletionOutput, best: int, offset: int) -> dict[str, Any]:
        """A chunk's choice. `best` alternatives are shown for each token; `offset` characters came before."""

    def answer_choice(self, index: int, part: CompletionOutput, best: int) -> dict[str, Any]:
        """An answer's choice."""


class CompletionForm:
    """/v1/completions."""

    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"
    echoes_logprobs = True

    def opening_choice(self, index: int) -> None:
        """None."""

    def chunk_choice(self, index: int, part: CompletionOutput, best: int, offset: int) -> dict[str, Any]:
        """The same shape in chunks and answers."""
        return {
            "index": index,
            "text": part.text,
            "logprobs": _completion_logprobs(part, offset),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }

    def answer_choice(self, index: int, part: CompletionOutput, best: int) -> dict[str, Any]:
        """A chunk's choice that holds the whole text."""
        return self.chunk_choice(index, part, best, 0)


class ChatForm:
    """/v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    echoes_logprobs = False

    def opening_choice(self, index: int) -> dict[str, Any]:
        """The assistant's role."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk_choice(self, index: int, part: CompletionOutput, best: int, offset: int) -> dict[str, Any]:
        """The choice's `delta`."""
        return {
            "index": index,
            "delta": {"content": part.text} if part.text or part.finish_reason is None else {},
            "logprobs": _chat_logprobs(part, best),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }

    def answer_choice(self, index: int, part: CompletionOutput, best: int) -> dict[str, Any]:
        """The choice's `message`."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": part.text, "refusal": None},
            "logprobs": _chat_logprobs(part, best),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }


def _completion_logprobs(part: CompletionOutput, offset: int) -> dict[str, Any] | None:
    if part.logprobs is None:
        return None
    logprobs: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for table in part.logprobs:
        own = own_entry(table)
        logprobs["tokens"].append(own.decoded_token)
        logprobs["text_offset"].append(offset)
        logprobs["token_logprobs"].append(own.logprob if own.rank else None)
        best: dict[str, float] = {}
        for entry in table.values():  # two tokens may have the same text: keep the likelier
            best[entry.decoded_token] = max(entry.logprob, best.get(entry.decoded_token, entry.logprob))
        logprobs["top_logprobs"].append(best if own.rank else None)
        offset += len(own.decoded_token)
    return logprobs


def _chat_logprobs(part: CompletionOutput, best: int) -> dict[str, Any] | None:
    if part.logprobs is None:
        return None
    content = []
    for table in part.logprobs:
        top = sorted((entry for entry in table.values() if entry.rank <= best), key=lambda entry: entry.rank)
        content.append({**_chat_entry(own_entry(table)), "top_logprobs": [_chat_entry(entry) for entry in top]})
    return {"content": content}


def _chat_entry(entry: Logprob) -> dict[str, Any]:
    # Part of a character shows as U+FFFD, whose bytes would be no token's.
    text = entry.decoded_token
    return {"token": text, "logprob": entry.logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


COMPLETION_FORM: Form = CompletionForm()
CHAT_FORM: Form = ChatForm()
