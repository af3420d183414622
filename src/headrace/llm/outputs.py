"""What a user gets back: the field's standard names, as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CompletionOutput", "Logprob", "RequestOutput"]


@dataclass(slots=True)
class Logprob:
    """A token's log-probability in the raw distribution (before penalties and temperature) and its rank from 1."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One choice. `logprobs[i]` maps token ids to `Logprob` for token i: the chosen one first, then the best."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """None while it runs; "stop" (an end token or stop string), "length" or "abort"."""
    stop_reason: int | str | None = None
    """The stop token id or string that ended it; None for the model's own end-of-sequence token."""


@dataclass(slots=True)
class RequestOutput:
    """A request's state. `prompt_logprobs[0]` is None: nothing stands before the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the cache."""
    weights_version: int = 0
    """Of the weights that gave its last token."""
