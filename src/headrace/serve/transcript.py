"""`Transcript`: a request and its output so far, from which another instance continues with the same tokens."""

from __future__ import annotations

from dataclasses import replace

from headrace.engine.schedule.sampling import SamplingParams
from headrace.instance.wire import Add, Delta, Resume
from headrace.llm.outputs import RequestOutput
from headrace.llm.records import ResumeRecord

__all__ = ["Transcript"]


class Transcript:
    """One request. Its record grows with its deltas."""

    def __init__(self, wire_name: str, record: ResumeRecord) -> None:
        """`wire_name` is the request's name in messages: unlike the user's, it is unique."""
        self.wire_name = wire_name
        self._record = record
        self._begun = False

    @property
    def output(self) -> RequestOutput:
        """The output so far: always the same object."""
        return self._record.output

    @property
    def params(self) -> SamplingParams:
        """The request's parameters, with a seed."""
        return self._record.params

    @property
    def seats(self) -> int:
        """Sequences that the request runs at once."""
        return max(self.params.n, self.params.beam_width)

    def take(self, delta: Delta) -> None:
        """Append a delta."""
        self._begun = True
        self.output.extend(delta.output)

    def end(self, finish_reason: str) -> None:
        """Finish every choice that still runs."""
        for choice in self.output.outputs:
            choice.finish_reason = choice.finish_reason or finish_reason
        self.output.finished = True

    def command(self, fingerprint: str) -> Add | Resume:
        """The message that starts the request on an instance, or continues it if there were deltas."""
        record = self._record
        if not self._begun:
            ids = record.output.prompt_token_ids
            return Add(self.wire_name, ids, record.params, record.priority, record.cache_key)
        output = replace(record.output, request_id=self.wire_name, prompt=None)
        return Resume(replace(record, output=output, fingerprint=fingerprint))
