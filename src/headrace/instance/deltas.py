"""`SentOutput`: from the output of a request to deltas, the parts that are new since the last delta.

What was sent is never taken back. `Choice.take` cuts only tokens of its own step, so a token that is in an output after
its step stays; text may come in a later delta than its tokens, when it can no longer change.
"""

from __future__ import annotations

from dataclasses import replace

from headrace.instance.wire import Delta
from headrace.llm.outputs import CompletionOutput, RequestOutput

__all__ = ["SentOutput"]


class SentOutput:
    """How much of one request's output has been sent."""

    def __init__(self, output: RequestOutput) -> None:
        """`output` counts as sent: it is empty, or the gateway resumed the request with it."""
        self._choices = [_extent(choice) for choice in output.outputs]
        self._prompt_logprobs = len(output.prompt_logprobs or ())

    def delta(self, output: RequestOutput) -> Delta | None:
        """What `output` has beyond what was sent, which then counts as sent; None if there is nothing new."""
        choices = []
        for i, (choice, sent) in enumerate(zip(output.outputs, self._choices)):
            self._choices[i] = _extent(choice)
            if self._choices[i] != sent:
                tokens, characters, _ = sent
                choices.append(choice.since(tokens, characters))
        scores = (output.prompt_logprobs or [])[self._prompt_logprobs :]
        self._prompt_logprobs += len(scores)
        if not choices and not scores and not output.finished:
            return None
        part = replace(output, prompt=None, prompt_token_ids=[], outputs=choices, prompt_logprobs=scores or None)
        return Delta(part)


def _extent(choice: CompletionOutput) -> tuple[int, int, bool]:
    """Tokens, characters, whether it is finished: a step that changes a choice changes one of these."""
    return len(choice.token_ids), len(choice.text), choice.finish_reason is not None
