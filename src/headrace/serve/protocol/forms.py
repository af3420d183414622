"""The shapes of completions and chats: one `ChoicePart` of a choice becomes a chunk's choice, or a whole answer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from headrace.instance.wire import ChoiceDelta, TokenEntry
from headrace.llm.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = ["CHAT_FORM", "COMPLETION_FORM", "ChoicePart", "Form", "prompt_part", "prompt_tables", "usage"]

LogprobRow = Sequence[TokenEntry] | None
"""A token's own entry, then the best ones; None for a prompt's first token."""


@dataclass(slots=True)
class ChoicePart:
    """Consecutive tokens of one choice, with their text. `rows` has one row a token, or is None."""

    text: str = ""
    token_ids: Sequence[int] = ()
    rows: Sequence[LogprobRow] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @classmethod
    def of_delta(cls, new: ChoiceDelta) -> ChoicePart:
        """The new part of a choice."""
        return cls(new.text, new.token_ids, new.logprobs, new.finish_reason, new.stop_reason)

    @classmethod
    def of_output(cls, whole: CompletionOutput) -> ChoicePart:
        """A finished choice."""
        rows = None if whole.logprobs is None else [entries(table) for table in whole.logprobs]
        return cls(whole.text, whole.token_ids, rows, whole.finish_reason, whole.stop_reason)

    def __add__(self, other: ChoicePart) -> ChoicePart:
        """This part and the next one, joined."""
        rows = None if self.rows is None and other.rows is None else [*(self.rows or ()), *(other.rows or ())]
        return ChoicePart(
            self.text + other.text, [*self.token_ids, *other.token_ids], rows, other.finish_reason, other.stop_reason
        )


def entries(table: Mapping[int, Logprob]) -> list[TokenEntry]:
    """A table of log-probabilities as a row."""
    return [TokenEntry(token, entry.logprob, entry.rank, entry.decoded_token) for token, entry in table.items()]


def prompt_part(text: str, output: RequestOutput, first_token: str, shown: bool) -> ChoicePart:
    """The prompt as a part of a choice, for an echo. `first_token` is the first token's text."""
    ids = output.prompt_token_ids
    if not shown or output.prompt_logprobs is None:
        return ChoicePart(text, ids)
    rows: list[LogprobRow] = [None if table is None else entries(table) for table in output.prompt_logprobs]
    if rows:
        rows[0] = [TokenEntry(ids[0], 0.0, 0, first_token)]  # rank 0: the first token is not predicted
    return ChoicePart(text, ids, rows)


def prompt_tables(output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """`prompt_logprobs` as vLLM sends them: token id to its entry."""
    if output.prompt_logprobs is None:
        return None
    return [
        None
        if table is None
        else {
            str(token): {"logprob": e.logprob, "rank": e.rank, "decoded_token": e.decoded_token}
            for token, e in table.items()
        }
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

    def chunk_choice(self, index: int, part: ChoicePart, best: int, offset: int) -> dict[str, Any]:
        """A chunk's choice. `best` alternatives are shown for each token; `offset` characters came before."""

    def answer_choice(self, index: int, part: ChoicePart, best: int) -> dict[str, Any]:
        """An answer's choice."""


class CompletionForm:
    """/v1/completions."""

    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"
    echoes_logprobs = True

    def opening_choice(self, index: int) -> None:
        """None."""

    def chunk_choice(self, index: int, part: ChoicePart, best: int, offset: int) -> dict[str, Any]:
        """The same shape in chunks and answers."""
        return {
            "index": index,
            "text": part.text,
            "logprobs": _completion_logprobs(part, offset),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }

    def answer_choice(self, index: int, part: ChoicePart, best: int) -> dict[str, Any]:
        """A chunk's choice that holds the whole text."""
        return self.chunk_choice(index, part, best, 0)


class ChatForm:
    """/v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    echoes_logprobs = False

    def opening_choice(self, index: int) -> dict[str, Any]:
        """The assistant's role."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk_choice(self, index: int, part: ChoicePart, best: int, offset: int) -> dict[str, Any]:
        """The choice's `delta`."""
        return {
            "index": index,
            "delta": {"content": part.text} if part.text or part.finish_reason is None else {},
            "logprobs": _chat_logprobs(part, best),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }

    def answer_choice(self, index: int, part: ChoicePart, best: int) -> dict[str, Any]:
        """The choice's `message`."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": part.text, "refusal": None},
            "logprobs": _chat_logprobs(part, best),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }


def _completion_logprobs(part: ChoicePart, offset: int) -> dict[str, Any] | None:
    if part.rows is None:
        return None
    logprobs: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for row in part.rows:
        assert row is not None
        own = row[0]
        logprobs["tokens"].append(own.decoded_token)
        logprobs["text_offset"].append(offset)
        logprobs["token_logprobs"].append(own.logprob if own.rank else None)
        best: dict[str, float] = {}
        for entry in row:  # two tokens may have the same text: keep the likelier
            best[entry.decoded_token] = max(entry.logprob, best.get(entry.decoded_token, entry.logprob))
        logprobs["top_logprobs"].append(best if own.rank else None)
        offset += len(own.decoded_token)
    return logprobs


def _chat_logprobs(part: ChoicePart, best: int) -> dict[str, Any] | None:
    if part.rows is None:
        return None
    content = []
    for row in part.rows:
        assert row is not None
        top = sorted((entry for entry in row if entry.rank <= best), key=lambda entry: entry.rank)
        content.append({**_chat_entry(row[0]), "top_logprobs": [_chat_entry(entry) for entry in top]})
    return {"content": content}


def _chat_entry(entry: TokenEntry) -> dict[str, Any]:
    # Part of a character shows as U+FFFD, whose bytes would be no token's.
    text = entry.decoded_token
    return {"token": text, "logprob": entry.logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


COMPLETION_FORM: Form = CompletionForm()
CHAT_FORM: Form = ChatForm()
