"""`RequestLimits`: what a request may ask of an engine, and what it reserves."""

from __future__ import annotations

from headrace.engine.schedule.request import Request
from headrace.errors import RequestError

__all__ = ["RequestLimits"]


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
        limit = f"the context of {self.context} tokens"
        if self.max_model_len < self.context:
            limit = f"the KV cache of {self.capacity} tokens (the context is {self.context})"
        if prompt >= self.max_model_len:
            raise RequestError(f"the prompt of {prompt} tokens leaves no room in {limit}: shorten it")
        if params.max_tokens is not None and prompt + params.max_tokens > self.max_model_len:
            raise RequestError(
                f"the prompt of {prompt} tokens and max_tokens={params.max_tokens} make "
                f"{prompt + params.max_tokens}, more than {limit}: ask for at most "
                f"{self.max_model_len - prompt}"
            )
        output = self.max_output(request)
        if request.num_output_tokens >= output:
            raise RequestError(f"the request has {request.num_output_tokens} of {output} output tokens: it is done")
        allowed = params.allowed_token_ids
        if params.min_tokens and allowed is not None and self.stop_ids(request).keys() >= set(allowed):
            raise RequestError(f"min_tokens={params.min_tokens} bans every one of allowed_token_ids")
