"""`BeamSearch`: beam search by fork (PagedAttention §4.4), on log-probabilities as plain numbers.

Each beam is a request whose next token is chosen here instead of sampled. A step of the search:

    updates of all beams ──> best candidates ──> one child stays in its parent's request, the others fork from it
                                             ──> candidates that end are kept aside; beams left without one stop
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.engine.schedule.plan import TokenLogprobs
from headrace.engine.schedule.request import Request, RequestUpdate
from headrace.engine.schedule.scheduler import Scheduler

__all__ = ["BeamSearch", "Hypothesis"]


@dataclass(slots=True)
class Hypothesis:
    """One finished sequence. `score` is Σ logprob / length ** length_penalty over the output, its end included."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class _Beam:
    """A running beam: its request and the records of the tokens chosen so far."""

    request: Request
    logprobs: list[TokenLogprobs]
    latest: TokenLogprobs | None = None


@dataclass(slots=True)
class _Candidate:
    total: float
    beam: int
    rank: int
    record: TokenLogprobs


class BeamSearch:
    """One search from one request with `beam_width` W > 0, which it adds to the scheduler.

    The caller passes every update of the group (`update.group_id == request.group_id`) to `take`, until that
    returns True; `hypotheses` then holds the best `n`, best first. Each round keeps the W best candidates by Σ
    logprob that do not end; ties go to the earlier beam, then to the better rank. The search ends when no running
    beam can still beat the n-th best finished one: later log-probabilities are at most 0, so the bound is exact.
    A search is deterministic: a lost one is resumed by starting it again.
    """

    def __init__(self, scheduler: Scheduler, request: Request, new_id: Callable[[], int]) -> None:
        self._scheduler = scheduler
        self._params = request.params
        self._new_id = new_id
        self._width = request.params.beam_width
        self._finished: list[Hypothesis] = []
        self._beams = [_Beam(request, [])]
        scheduler.add(request)
        self._stop_ids = dict(request.stop_ids)
        self._max_output = request.max_output
        self.group_id = request.group_id

    @property
    def request_ids(self) -> list[int]:
        """Requests of the running beams."""
        return [beam.request.request_id for beam in self._beams]

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """The `n` best finished sequences so far, best first; ties in the order they ended."""
        return sorted(self._finished, key=lambda hypothesis: -hypothesis.score)[: self._params.n]

    def take(self, update: RequestUpdate) -> bool:
        """Take one beam's result; when every beam has one, advance them. Returns whether the search is over."""
        for beam in self._beams:
            if beam.request.request_id == update.request_id and update.logprobs:
                beam.latest = update.logprobs[-1]
        if self._beams and all(beam.latest is not None for beam in self._beams):
            self._advance()
        return not self._beams

    def abort(self) -> None:
        """Stop every running beam and free its blocks."""
        self._stop(self._beams, "abort")
        self._beams = []

    def _advance(self) -> None:
        length = self._beams[0].request.num_output_tokens + 1
        going: list[_Candidate] = []
        for candidate in self._candidates():
            token = candidate.record.token_id
            if token in self._stop_ids and length > self._params.min_tokens:
                self._end(candidate, "stop", self._stop_ids[token])
            elif token not in self._stop_ids and len(going) < self._width:
                going.append(candidate)
        if length >= self._max_output:
            for candidate in going:
                self._end(candidate, "length", None)
            going = []
        elif not self._can_improve(going, length):
            going = []
        self._move(going)

    def _candidates(self) -> list[_Candidate]:
        """The best tokens of all beams, best first, up to the W-th that does not end."""
        found: list[_Candidate] = []
        for index, beam in enumerate(self._beams):
            assert beam.latest is not None
            pairs = zip(beam.latest.top_ids, beam.latest.top_logprobs)
            for rank, (token, logprob) in enumerate(pairs, 1):
                total = beam.request.cumulative_logprob + logprob
                found.append(_Candidate(total, index, rank, TokenLogprobs(token, logprob, rank)))
        found.sort(key=lambda candidate: (-candidate.total, candidate.beam, candidate.rank))
        going = 0
        for count, candidate in enumerate(found, 1):
            going += candidate.record.token_id not in self._stop_ids
            if going == self._width:
                return found[:count]
        return found

    def _score(self, total: float, length: int) -> float:
        return total / math.pow(length, self._params.length_penalty)

    def _end(self, candidate: _Candidate, reason: str, stop_reason: int | None) -> None:
        beam = self._beams[candidate.beam]
        tokens = [*beam.request.output_token_ids, candidate.record.token_id]
        self._finished.append(
            Hypothesis(
                tokens,
                candidate.total,
                self._score(candidate.total, len(tokens)),
                reason,
                stop_reason,
                [*beam.logprobs, candidate.record],
            )
        )

    def _can_improve(self, going: Sequence[_Candidate], length: int) -> bool:
        best = self.hypotheses
        if not going or len(best) < self._params.n:
            return bool(going)
        bound = max(self._score(going[0].total, length + 1), self._score(going[0].total, self._max_output))
        return bound > best[-1].score

    def _move(self, going: Sequence[_Candidate]) -> None:
        """Make the chosen candidates the beams. Fork before any parent is extended."""
        continued: set[int] = set()
        moved: list[tuple[_Beam, _Candidate]] = []
        for candidate in going:
            parent = self._beams[candidate.beam]
            request = parent.request
            if candidate.beam in continued:
                request = self._fork(request)
            continued.add(candidate.beam)
            moved.append((_Beam(request, [*parent.logprobs, candidate.record]), candidate))
        self._stop([beam for index, beam in enumerate(self._beams) if index not in continued], "stop")
        for beam, candidate in moved:
            self._scheduler.extend(beam.request.request_id, [candidate.record.token_id], candidate.total)
        self._beams = [beam for beam, _ in moved]

    def _fork(self, parent: Request) -> Request:
        child = Request(
            self._new_id(),
            parent.prompt_token_ids,
            self._params,
            seed=parent.seed,
            choice=parent.choice,
            priority=parent.priority,
            group_id=parent.group_id,
            cache_key=parent.cache_key,
            output_token_ids=parent.output_token_ids,
        )
        self._scheduler.fork(parent.request_id, child)
        return child

    def _stop(self, beams: Sequence[_Beam], reason: str) -> None:
        for beam in beams:
            self._scheduler.finish(beam.request.request_id, reason)
