"""What a user gets back: the field's standard names, as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from headrace.engine.schedule.sampling import SamplingParams

__all__ = ["CompletionOutput", "Logprob", "RequestOutput"]


class Logprob(NamedTuple):
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

    def snapshot(self) -> CompletionOutput:
        """A copy that does not grow."""
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return replace(self, token_ids=list(self.token_ids), logprobs=logprobs)


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

    @classmethod
    def begin(
        cls, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams
    ) -> RequestOutput:
        """Of a new request: n empty choices, with lists for the log-probabilities that `params` asks for."""
        choices = [CompletionOutput(i) for i in range(params.n)]
        if params.logprobs is not None:
            for choice in choices:
                choice.logprobs, choice.cumulative_logprob = [], 0.0
        scores: list[dict[int, Logprob] | None] | None = None if params.prompt_logprobs is None else [None]
        return cls(request_id, prompt, prompt_token_ids, choices, prompt_logprobs=scores)

    def snapshot(self) -> RequestOutput:
        """A copy that does not grow."""
        scores = None if self.prompt_logprobs is None else list(self.prompt_logprobs)
        return replace(self, outputs=[choice.snapshot() for choice in self.outputs], prompt_logprobs=scores)
