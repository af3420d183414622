"""`Transcript`: all that a request was and has brought, from which another instance goes on with the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from headrace.cache.key import CacheKey
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.instance.wire import Add, Delta, Resume, TokenEntry
from headrace.llm.outputs import CompletionOutput, Logprob, RequestOutput
from headrace.llm.records import plain_output, plain_prompt_logprobs

__all__ = ["Transcript"]


class Transcript:
    """One request by the name that the instance knows it by, and its output as it grows."""

    def __init__(
        self,
        wire_name: str,
        name: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        priority: int,
        cache_key: CacheKey,
    ) -> None:
        """`params` has a seed: without one, no other instance could draw the same tokens."""
        assert params.seed is not None
        self.wire_name = wire_name
        self.params = params
        self.seed = params.seed
        self.priority = priority
        self.cache_key = cache_key
        choices = [CompletionOutput(i) for i in range(params.n)]
        if params.logprobs is not None:
            for choice in choices:
                choice.logprobs, choice.cumulative_logprob = [], 0.0
        self.output = RequestOutput(name, prompt, prompt_token_ids, choices)
        if params.prompt_logprobs is not None:
            self.output.prompt_logprobs = []
        self._begun = False

    @property
    def seats(self) -> int:
        """Sequences that run for it at once."""
        return max(self.params.n, self.params.beam_width)

    def take(self, delta: Delta) -> None:
        """Add what is new."""
        self._begun = True
        output = self.output
        for new in delta.choices:
            choice = output.outputs[new.index]
            choice.text += new.text
            choice.token_ids += new.token_ids
            if new.logprobs is not None and choice.logprobs is not None:
                choice.logprobs += [_table(entries) for entries in new.logprobs]
            choice.cumulative_logprob = new.cumulative_logprob
            choice.finish_reason, choice.stop_reason = new.finish_reason, new.stop_reason
        if delta.prompt_logprobs is not None and output.prompt_logprobs is not None:
            output.prompt_logprobs += [None if row is None else _table(row) for row in delta.prompt_logprobs]
        output.num_cached_tokens = delta.num_cached_tokens
        output.weights_version = delta.weights_version
        output.finished = delta.finished

    def end(self, finish_reason: str) -> None:
        """It is over for a reason from outside."""
        for choice in self.output.outputs:
            choice.finish_reason = choice.finish_reason or finish_reason
        self.output.finished = True

    def command(self, fingerprint: str) -> Add | Resume:
        """What has an instance of this fingerprint go on with it, or begin it where nothing came yet."""
        if self._begun:
            return Resume(self._record(fingerprint))
        params = {f.name: getattr(self.params, f.name) for f in fields(self.params)}
        return Add(self.wire_name, self.output.prompt_token_ids, params, self.priority, self.cache_key)

    def _record(self, fingerprint: str) -> dict[str, Any]:
        """The form of `Frontend.resume_record`. A beam search, whose choices are empty, begins again."""
        output = self.output
        return {
            "name": self.wire_name,
            "prompt": None,
            "fingerprint": fingerprint,
            "prompt_logprobs": plain_prompt_logprobs(output),
            "num_cached_tokens": output.num_cached_tokens,
            "choices": [
                {"request": None if c.finish_reason else self._request(c).resume_record(), "output": plain_output(c)}
                for c in output.outputs
            ],
        }

    def _request(self, choice: CompletionOutput) -> Request:
        index = 0 if self.params.beam_width else choice.index
        request = Request(
            0,
            self.output.prompt_token_ids,
            self.params,
            seed=self.seed,
            choice=index,
            priority=self.priority,
            cache_key=self.cache_key,
            output_token_ids=choice.token_ids,
        )
        request.num_scored = max(request.num_scored, len(self.output.prompt_logprobs or ()) - 1)
        return request


def _table(entries: Sequence[TokenEntry]) -> dict[int, Logprob]:
    return {e.token_id: Logprob(e.logprob, e.rank, e.decoded_token) for e in entries}
