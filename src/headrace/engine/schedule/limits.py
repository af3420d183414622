"""`RequestLimits`: what a request may ask of an engine, and what it reserves."""

from __future__ import annotations

from headrace.engine.schedule.request import Request
from headrace.errors import RequestError

__all__ = ["RequestLimits"]

OVERFLOW = "context_length_exceeded"
"""OpenAI's code."""


class RequestLimits:
    """Limits in tokens. `context` is the model's; `capacity` is what the KV cache holds for one request."""

    def __init__(self, context: int, capacity: int, eos_token_ids: tuple[int, ...], reserve: str) -> None:
        """`reserve` is one of `RESERVE`."""
        self.context = context
        self.capacity = capacity
        self.max_model_len = min(context, capacity)
        self.eos_token_ids = eos_token_ids
        self._reserve = reserve

    def max_output(self, request: Request) -> int:
        """Output tokens after which the request ends by length."""
        asked = request.params.max_tokens
        return self.max_model_len - request.num_prompt_tokens if asked is None else asked

    def stop_ids(self, request: Request) -> dict[int, int | None]:
        """Token ids that end the request, with the `stop_reason` they give."""
        params = request.params
        ends: dict[int, int | None] = {} if params.ignore_eos else dict.fromkeys(self.eos_token_ids)
        return ends | {token: token for token in params.stop_token_ids}

    def reservation(self, request: Request) -> int:
        """Tokens reserved at admission: the baselines of PagedAttention §6.1; 0 without a reservation."""
        prompt, output = request.num_prompt_tokens, self.max_output(request)
        if self._reserve == "max":
            return self.max_model_len
        if self._reserve == "pow2":
            return min(self.max_model_len, prompt + (1 << (output - 1).bit_length()))
        return prompt + output if self._reserve == "oracle" else 0

    def check(self, request: Request) -> None:
        """Raise `RequestError`, with the numbers, if the request can never run."""
        params, prompt = request.params, request.num_prompt_tokens
        self.check_prompt(prompt, room=1)
        if params.max_tokens is not None and prompt + params.max_tokens > self.max_model_len:
            raise self._overflow(
                "max_tokens",
                "{prompt} of {} tokens and {max_tokens}={} make {}, more than {}: ask for at most {}",
                prompt,
                params.max_tokens,
                prompt + params.max_tokens,
                self._limit,
                self.max_model_len - prompt,
            )
        done, output = request.num_output_tokens, self.max_output(request)
        if done >= output:
            raise RequestError.about("max_tokens", "the request has {} of {} output tokens: it is done", done, output)
        allowed = params.allowed_token_ids
        if params.min_tokens and allowed is not None and self.stop_ids(request).keys() >= set(allowed):
            raise RequestError.about(
                "min_tokens", "{min_tokens}={} bans every one of {allowed_token_ids}", params.min_tokens
            )

    def check_prompt(self, count: int, room: int = 0) -> None:
        """Raise `RequestError` if a prompt of `count` tokens does not leave `room` for tokens to be generated."""
        if not count:
            raise RequestError.about("prompt", "{prompt} has no tokens: give it a text, or token ids")
        if count + room > self.max_model_len:
            reason = "{prompt} has {} tokens, which leaves no room in {}: shorten it"
            if not room:
                reason = "{prompt} of {} tokens is longer than {}: shorten it"
            raise self._overflow("prompt", reason, count, self._limit)

    @property
    def _limit(self) -> str:
        if self.max_model_len < self.context:
            return f"the KV cache of {self.capacity} tokens (the context is {self.context})"
        return f"the context of {self.context} tokens"

    def _overflow(self, param: str, reason: str, *values: object) -> RequestError:
        """Clients tell an overflow from other errors by OpenAI's words and code; some see no more than the message."""
        template = f"This model's maximum context length is {{}} tokens: {reason} ({OVERFLOW})"
        return RequestError.about(param, template, self.max_model_len, *values, code=OVERFLOW)
