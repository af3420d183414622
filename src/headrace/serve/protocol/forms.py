"""The shapes of completions and chats: a part of a choice becomes a chunk's choice, a whole one an answer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from headrace.llm.outputs import CompletionOutput, RequestOutput
from headrace.serve.protocol.logprobs import PlacedToken, TokenShapes
from headrace.serve.protocol.message import MessagePart

__all__ = ["CHAT_FORM", "COMPLETION_FORM", "Form", "prompt_tables", "usage"]


def prompt_tables(output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """`prompt_logprobs` as vLLM sends them: token id to its entry."""
    if output.prompt_logprobs is None:
        return None
    return [
        None if table is None else {str(token): entry._asdict() for token, entry in table.items()}
        for table in output.prompt_logprobs
    ]


def usage(
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int,
    reasoning_tokens: int | None = None,
    drafts: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A `usage` object, in tokens. `drafts` of a request with a prediction: those computed, and those accepted."""
    details: dict[str, int] = {}
    if reasoning_tokens is not None:
        details["reasoning_tokens"] = reasoning_tokens
    if drafts is not None:
        drafted, accepted = drafts
        details |= {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": details or None,
    }


class Form(Protocol):
    """The shape of one endpoint's answers."""

    prefix: str
    """Of answers' ids."""
    object: str
    chunk_object: str
    echoes_logprobs: bool
    """Whether an echo includes the prompt's log-probabilities."""
    prompt_on_top: bool
    """Whether what is said of the prompt is a field of the answer, not of each choice."""

    def logprobs(self, shapes: TokenShapes, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        """The `logprobs` of a choice that has these tokens."""

    def opening_choice(self, index: int) -> dict[str, Any] | None:
        """The choice of a stream's first chunk, if there is one before any token."""

    def chunk_choice(
        self, index: int, part: CompletionOutput, message: MessagePart, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """A chunk's choice. `message` is what the part's text says."""

    def answer_choice(
        self, index: int, part: CompletionOutput, message: MessagePart, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """An answer's choice."""


class CompletionForm:
    """/v1/completions."""

    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"
    echoes_logprobs, prompt_on_top = True, False

    def logprobs(self, shapes: TokenShapes, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        """Four parallel lists."""
        return shapes.of_completion(tokens)

    def opening_choice(self, index: int) -> None:
        """None."""

    def chunk_choice(
        self, index: int, part: CompletionOutput, message: MessagePart, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The same shape in chunks and answers."""
        return {"index": index, "text": part.text, **_end(part, logprobs)}

    def answer_choice(
        self, index: int, part: CompletionOutput, message: MessagePart, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """A chunk's choice that holds the whole text."""
        return self.chunk_choice(index, part, message, logprobs)


class ChatForm:
    """/v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    echoes_logprobs, prompt_on_top = False, True

    def logprobs(self, shapes: TokenShapes, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        """An object for each token."""
        return shapes.of_chat(tokens)

    def opening_choice(self, index: int) -> dict[str, Any]:
        """The assistant's role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def chunk_choice(
        self, index: int, part: CompletionOutput, message: MessagePart, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The choice's `delta`."""
        delta: dict[str, Any] = {}
        if message.reasoning:
            delta |= dict.fromkeys(REASONING, message.reasoning)
        if message.calls:
            delta["tool_calls"] = message.calls
        if message.content or (not delta and part.finish_reason is None):
            delta["content"] = message.content
        return {"index": index, "delta": delta, **_end(part, logprobs)}

    def answer_choice(
        self, index: int, part: CompletionOutput, message: MessagePart, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The choice's `message`, with the keys that clients' types have. An empty list is no value of theirs."""
        whole: dict[str, Any] = {"role": "assistant", "content": message.content, **NOT_IN_MESSAGES}
        if message.calls:
            whole["content"] = message.content or None
            whole["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in message.calls]
        whole |= dict.fromkeys(REASONING, message.reasoning or None)
        return {"index": index, "message": whole, **_end(part, logprobs)}


def _end(part: CompletionOutput, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"logprobs": logprobs, "finish_reason": part.finish_reason, "stop_reason": part.stop_reason}


NOT_IN_MESSAGES = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
REASONING = ("reasoning_content", "reasoning")
"""The names that clients read."""
COMPLETION_FORM: Form = CompletionForm()
CHAT_FORM: Form = ChatForm()
