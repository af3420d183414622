"""Outputs, by vLLM's names.

The same types carry a request's output everywhere: engine → wire → gateway → HTTP. A *part* is an output that has only
what is new: `since` cuts it, `extend` appends it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, fields, replace
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
    """One choice. `logprobs[i]` maps token ids to `Logprob` for token i: the sampled one first, then the best."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """None while it runs; "stop" (an end token or stop string), "length" or "abort"."""
    stop_reason: int | str | None = None
    """The stop token id or string that ended it; None for the model's own end-of-sequence token."""
    accepted: list[int] = field(default_factory=list, compare=False)
    """Places in `token_ids`, ascending, of drafts that stand there. They say how it came: equal outputs may differ."""

    def since(self, tokens: int, characters: int) -> CompletionOutput:
        """The part after the first `tokens` and the first `characters` of `text`; places are those in the whole."""
        return replace(
            self,
            text=self.text[characters:],
            token_ids=self.token_ids[tokens:],
            logprobs=None if self.logprobs is None else self.logprobs[tokens:],
            accepted=self.accepted[bisect_left(self.accepted, tokens) :],
        )

    def extend(self, part: CompletionOutput) -> None:
        """Append a part. Fields that do not grow are replaced by the part's."""
        self.text += part.text
        self.token_ids += part.token_ids
        self.accepted += part.accepted
        if part.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += part.logprobs
        for name in _CHOICE_STATE:
            setattr(self, name, getattr(part, name))


@dataclass(slots=True)
class RequestOutput:
    """One request. `prompt_logprobs[0]` is None: the first token is not predicted."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the cache."""
    weights_version: int = 0
    """Of the weights that computed the last token."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Drafts that were computed for it, and those that stand in the output. A resumed request counts on."""

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
        return replace(self, outputs=[choice.since(0, 0) for choice in self.outputs], prompt_logprobs=scores)

    def extend(self, part: RequestOutput) -> None:
        """Append a part. It has only the choices with something new, and no prompt."""
        for choice in part.outputs:
            self.outputs[choice.index].extend(choice)
        if part.prompt_logprobs is not None:
            self.prompt_logprobs = self.prompt_logprobs or []
            self.prompt_logprobs += part.prompt_logprobs
        for name in _REQUEST_STATE:
            setattr(self, name, getattr(part, name))


def _others(kind: type, *grows: str) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind) if f.name not in grows)


_CHOICE_STATE = _others(CompletionOutput, "text", "token_ids", "logprobs", "accepted")
_REQUEST_STATE = _others(RequestOutput, "request_id", "prompt", "prompt_token_ids", "outputs", "prompt_logprobs")
