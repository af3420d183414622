"""`Transcript`: a request and all the output that came, from which another instance continues with the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.engine.schedule.sampling import SamplingParams
from headrace.instance.wire import Add, Delta, Resume, TokenEntry
from headrace.llm.outputs import Logprob, RequestOutput
from headrace.llm.records import ResumeRecord

__all__ = ["Transcript"]


class Transcript:
    """One request by the name that the instance knows it by, and its output as it grows."""

    def __init__(self, wire_name: str, record: ResumeRecord) -> None:
        self.wire_name = wire_name
        self._record = record
        self._begun = False

    @property
    def output(self) -> RequestOutput:
        """All that came so far, under the request's own name."""
        return self._record.output

    @property
    def params(self) -> SamplingParams:
        """With a seed."""
        return self._record.params

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
        """End every choice that still runs, for a reason from outside."""
        for choice in self.output.outputs:
            choice.finish_reason = choice.finish_reason or finish_reason
        self.output.finished = True

    def command(self, fingerprint: str) -> Add | Resume:
        """The message that continues it on an instance of this fingerprint, or begins it where nothing came yet."""
        record = self._record
        if not self._begun:
            ids = record.output.prompt_token_ids
            return Add(self.wire_name, ids, record.params, record.priority, record.cache_key)
        output = replace(record.output, request_id=self.wire_name, prompt=None)
        return Resume(replace(record, output=output, fingerprint=fingerprint))


def _table(entries: Sequence[TokenEntry]) -> dict[int, Logprob]:
    return {e.token_id: Logprob(e.logprob, e.rank, e.decoded_token) for e in entries}
