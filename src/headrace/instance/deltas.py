"""From the groups that a step touched to deltas: what is new since the last one, without copying what is old.

What was sent is never taken back. `Choice.take` cuts at most tokens of the step it takes, so a token that stands in
an output after its step stays; text may come in a later delta than its tokens, when it can no longer change.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace.instance.wire import ChoiceDelta, Delta, TokenEntry
from headrace.llm.outputs import CompletionOutput, Logprob, RequestOutput
from headrace.llm.processor import Group

__all__ = ["Sent"]


class Sent:
    """How much of one request's output has been sent: three numbers a choice."""

    def __init__(self, output: RequestOutput) -> None:
        """Of a request whose `output` so far the client has."""
        self._choices = [(len(c.token_ids), len(c.text), c.finish_reason is not None) for c in output.outputs]
        self._prompt_logprobs = len(output.prompt_logprobs or ())

    def news(self, group: Group) -> Delta | None:
        """What `group` has beyond what was sent, which counts as sent now; None if that is nothing."""
        output, choices = group.output, []
        for i, (choice, sent) in enumerate(zip(output.outputs, self._choices)):
            now = len(choice.token_ids), len(choice.text), choice.finish_reason is not None
            if now != sent:
                self._choices[i] = now
                choices.append(_choice_delta(choice, *sent[:2]))
        tables = None
        if output.prompt_logprobs is not None and len(output.prompt_logprobs) > self._prompt_logprobs:
            tables = [None if t is None else _entries(t) for t in output.prompt_logprobs[self._prompt_logprobs :]]
            self._prompt_logprobs = len(output.prompt_logprobs)
        if not choices and tables is None and not output.finished:
            return None
        return Delta(
            group.name,
            choices,
            tables,
            output.num_cached_tokens,
            output.finished,
            weights_version=output.weights_version,
        )


def _choice_delta(choice: CompletionOutput, tokens: int, characters: int) -> ChoiceDelta:
    return ChoiceDelta(
        choice.index,
        choice.text[characters:],
        choice.token_ids[tokens:],
        None if choice.logprobs is None else [_entries(table) for table in choice.logprobs[tokens:]],
        choice.cumulative_logprob,
        choice.finish_reason,
        choice.stop_reason,
    )


def _entries(table: Mapping[int, Logprob]) -> list[TokenEntry]:
    return [TokenEntry(token, entry.logprob, entry.rank, entry.decoded_token) for token, entry in table.items()]
