"""`Group`: a prompt and its choices. Turns the scheduler's tokens into text, stop strings and log-probabilities."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from headrace.engine.schedule.beam import Hypothesis
from headrace.engine.schedule.plan import TokenLogprobs
from headrace.engine.schedule.request import RequestUpdate
from headrace.engine.schedule.sampling import SamplingParams
from headrace.llm.outputs import CompletionOutput, Logprob, RequestOutput
from headrace.llm.records import ResumeRecord
from headrace.text.stopping import TextStream
from headrace.text.tokenizer import Tokenizer

__all__ = ["Choice", "Group"]


class Choice:
    """One choice of a prompt: detokenizes its output."""

    def __init__(
        self, output: CompletionOutput, prompt_ids: Sequence[int], params: SamplingParams, tokenizer: Tokenizer
    ) -> None:
        """`output` grows with each step; of a resumed request it already has tokens."""
        self.output = output
        self._params = params
        self._tokenizer = tokenizer
        self._stream = TextStream(
            tokenizer.detokenizer(params.skip_special_tokens, prompt_ids, params.shown_special_ids),
            params.stop,
            params.include_stop_str_in_output,
            params.min_tokens,
        )
        self._stream.push(output.token_ids)

    def take(self, update: RequestUpdate) -> int | None:
        """Add a step's tokens. If a stop string ends the text, returns the number of output tokens to keep."""
        out, before = self.output, len(self.output.token_ids)
        out.token_ids += update.token_ids
        drafts = range(before + update.drafts_at, before + update.drafts_at + update.accepted)
        # A draft that a constraint then forced may come with a later step, which scores it: no step was saved.
        out.accepted += drafts[: max(len(out.token_ids) - drafts.start, 0)]
        hidden = update.stop_token and not self._params.include_stop_str_in_output
        ids = update.token_ids
        if hidden and ids and not self._stream.names(ids[-1]):  # one that it names may complete a stop string
            ids = ids[:-1]
        self._stream.push(ids)
        if update.finish_reason is not None and self._stream.stop is None:
            self._stream.finish()
        if out.logprobs is not None:
            out.logprobs += [self.table(record, self._params.logprobs) for record in update.logprobs]
            out.cumulative_logprob = sum((r.logprob for r in update.logprobs), out.cumulative_logprob or 0.0)
        out.text = self._stream.text
        out.finish_reason, out.stop_reason = update.finish_reason, update.stop_reason
        if self._stream.stop is None:
            return None
        keep = max(self._stream.num_tokens, before)
        self._cut(keep)
        out.finish_reason, out.stop_reason = "stop", self._stream.stop
        return keep

    def end(self, finish_reason: str) -> None:
        """Finish a choice that still runs, for a reason such as an abort."""
        if self.output.finish_reason is None:
            self._stream.finish()
            self.output.text, self.output.finish_reason = self._stream.text, finish_reason

    def _cut(self, keep: int) -> None:
        out = self.output
        del out.token_ids[keep:]
        del out.accepted[bisect_left(out.accepted, keep) :]
        if out.logprobs is not None:
            del out.logprobs[keep:]
            out.cumulative_logprob = sum(table[token].logprob for table, token in zip(out.logprobs, out.token_ids))

    def table(self, record: TokenLogprobs, k: int | None) -> dict[int, Logprob]:
        """The sampled or scored token first, then the k best. This is where log-probabilities get their text."""
        text = self._tokenizer.token_text
        entries = {record.token_id: Logprob(record.logprob, record.rank, text(record.token_id))}
        for rank, (token, logprob) in enumerate(zip(record.top_ids[:k], record.top_logprobs[:k]), 1):
            entries.setdefault(token, Logprob(logprob, rank, text(token)))
        return entries


class Group:
    """One request: a prompt and its choices.

    Under beam search the choices stay empty until the search is over; then each gets one hypothesis.
    """

    def __init__(self, record: ResumeRecord, request_ids: Sequence[int], tokenizer: Tokenizer) -> None:
        """`record` grows with it; `request_ids` has one id for each choice."""
        self.record = record
        self.output: RequestOutput = record.output
        self.name = record.output.request_id
        self.params = record.params
        self.choices = {
            number: Choice(choice, record.output.prompt_token_ids, record.params, tokenizer)
            for number, choice in zip(request_ids, record.output.outputs)
        }

    def take(self, update: RequestUpdate) -> int | None:
        """Add a step's result of one choice; see `Choice.take`."""
        self.take_scores(update)
        choice = self.choices[update.request_id]
        before = len(choice.output.token_ids)
        keep = choice.take(update)
        self.output.drafted_tokens += update.drafted
        self.output.accepted_tokens += update.accepted if keep is None else min(update.accepted, keep - before)
        self._note_end()
        return keep

    def take_scores(self, update: RequestUpdate) -> None:
        """Add log-probabilities of prompt tokens."""
        if self.output.prompt_logprobs is not None:
            choice = next(iter(self.choices.values()))
            self.output.prompt_logprobs += [choice.table(r, self.params.prompt_logprobs) for r in update.scores]

    def take_hypotheses(self, hypotheses: Sequence[Hypothesis]) -> None:
        """Make the hypotheses of a finished search the choices, best first."""
        for (number, choice), found in zip(self.choices.items(), hypotheses):
            choice.take(
                RequestUpdate(
                    number,
                    number,
                    found.token_ids,
                    found.logprobs,
                    finish_reason=found.finish_reason,
                    stop_reason=found.stop_reason,
                    stop_token=found.finish_reason == "stop",
                )
            )
            choice.output.cumulative_logprob = found.cumulative_logprob
        self.end("length")

    def end(self, finish_reason: str) -> None:
        """Finish every choice that still runs."""
        for choice in self.choices.values():
            choice.end(finish_reason)
        self._note_end()

    def _note_end(self) -> None:
        self.output.finished = all(c.output.finish_reason is not None for c in self.choices.values())
