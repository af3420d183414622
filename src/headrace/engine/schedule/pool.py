"""`RequestPool`: every unfinished request, and every change of one. No other module writes to a `Request`.

add ──> waiting ──seat──> running ──grant──> (a plan in flight) ──complete──> running ──finish──> gone
           └───────────preempt────┘
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from headrace.cache.manager import CachedSequence, CacheManager
from headrace.engine.schedule.edits import EditState
from headrace.engine.schedule.limits import RequestLimits
from headrace.engine.schedule.mask import MaskFactory, no_masks, replay
from headrace.engine.schedule.plan import LogitEdits, Plan, SliceResult
from headrace.engine.schedule.policies import Policy
from headrace.engine.schedule.request import Request, RequestUpdate, Status
from headrace.engine.schedule.slices import add_drafts, make_slice
from headrace.engine.schedule.speculator import Speculator, common_prefix
from headrace.engine.schedule.stats import SchedulerStats
from headrace.errors import RequestError

__all__ = ["Grant", "RequestPool"]


class Grant(NamedTuple):
    """A request's part of a plan: positions [start, end)."""

    request: Request
    epoch: int
    """The request's when planned."""
    start: int
    end: int
    samples: int
    """Rows sampled at the end."""
    prompt_scores: int
    """Rows that score a token of the prompt; the rows behind them that are scored have a forced one."""
    drafts: Sequence[int] = ()
    """The tokens at the last positions, which are known only as far as they are accepted."""


class RequestPool:
    """The request pool of Orca §3.2: two queues in policy order, and the moves between them.

    `cache` changes the KV blocks; `counters` has the statistics.
    """

    def __init__(
        self,
        cache: CacheManager,
        policy: Policy,
        limits: RequestLimits,
        seats: int,
        swap: bool,
        masks: MaskFactory = no_masks,
        stepwise: bool = False,
        speculator: Speculator | None = None,
    ) -> None:
        """`seats` requests run at once. `swap`: preempted requests move to the host where it has room.

        `stepwise`: each forced token is computed in a step of its own. `speculator` learns every new token.
        """
        self.cache = cache
        self.policy = policy
        self.limits = limits
        self.seats = seats
        self.counters = SchedulerStats()
        self.requests: dict[int, Request] = {}
        """Every unfinished request by id."""
        self.running: list[Request] = []
        """In policy order."""
        self.waiting: list[Request] = []
        """In policy order."""
        self._swap = swap
        self._masks = masks
        self._stepwise = stepwise
        self._speculator = speculator
        self.num_drafting = 0
        """Unfinished requests for which the speculator may draft."""
        self.grants: list[Grant] = []  # of the plan being made, in the order of its slices
        self._arrivals = 0

    # ---- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request; raises `RequestError`, with the numbers, if it can never run."""
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id} is already in use", "request_id")
        self.limits.check(request)
        params = request.params
        request.max_output = self.limits.max_output(request)
        request.reserve = self.limits.reservation(request)
        request.stop_ids = self.limits.stop_ids(request)
        if request.is_beam:
            # Enough for W candidates that do not end, even if every end token is among the best.
            candidates = params.beam_width + max(params.beam_width, len(request.stop_ids))
            request.top = max(candidates, request.top or 0)
        elif EditState.wanted(params):
            request.edits = EditState(params, request.stop_ids, request.prompt_token_ids)
            for token in request.output_token_ids:
                request.edits.append(token)
        if params.masked:
            self._constrain(request)
        request.arrival = self._arrivals
        self._arrivals += 1
        self.requests[request.request_id] = request
        request.drafting = self._speculator is not None and self._speculator.wants(request)
        self.num_drafting += request.drafting
        insort(self.waiting, request, key=self.policy.key)

    def _constrain(self, request: Request) -> None:
        """Give a new request its mask, and the forced tokens that its output begins or goes on with."""
        params = request.params
        mask = self._masks(params, request.stop_ids)
        run = replay(mask, request.output_token_ids, params.jump_forward)
        request.mask = mask
        request.forced_apart = self._stepwise
        self._extend_forced(request, run)

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, keep_tokens: int | None = None
    ) -> None:
        """End a request and free what it holds; with `keep_tokens`, only so much of its output counts."""
        if keep_tokens is not None and keep_tokens < request.num_output_tokens:
            del request.token_ids[request.num_prompt_tokens + keep_tokens :]
            request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens)
        (self.running if request.status is Status.RUNNING else self.waiting).remove(request)
        self.cache.commit(request.kv, request.token_ids, request.num_tokens)  # tokens planned before they were known
        self.cache.release(request.kv)
        request.status = Status.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        if not request.is_beam:  # a beam is part of a search, which is the request
            self.counters.finished[reason] += 1
        del self.requests[request.request_id]
        if self._speculator is not None:
            self.num_drafting -= self._speculator.wants(request)
            self._speculator.finish(request)

    def fork(self, parent_id: int, child: Request) -> None:
        """Add `child`, which shares the blocks of the parent's computed tokens; see `Scheduler.fork`."""
        parent = self.requests[parent_id]
        shared = parent.kv.num_tokens
        if parent.num_pending or child.token_ids[:shared] != parent.token_ids[:shared]:
            raise ValueError(f"request {child.request_id} cannot fork from {parent_id}: its tokens are not the same")
        child.num_scored = parent.num_scored
        self.add(child)
        if parent.status is Status.RUNNING and len(self.running) < self.seats:
            self.cache.fork(parent.kv, child.kv, shared)
            self._run(child)

    def extend(self, request_id: int, token_ids: Sequence[int], cumulative_logprob: float) -> None:
        """Append tokens that a beam search has chosen; `cumulative_logprob` is that of the whole output."""
        request = self.requests[request_id]
        request.token_ids.extend(token_ids)
        request.cumulative_logprob = cumulative_logprob
        request.parked = False

    # ---- seats

    def has_room(self, need: int) -> bool:
        """Whether so many blocks are available. Those of drafts in flight are taken back before a prefix is evicted.

        The step in flight still tells which of these drafts are right; their KV is computed again.
        """
        if need > self.cache.pool.num_free:
            for request in self.running:
                if request.spec_token_ids:
                    self._rewind(request, request.num_tokens)
        return need <= self.cache.available

    def parent(self, request: Request) -> Request | None:
        """The unfinished request that computes this one's prompt. Once that has ended, its prefix is in the tree."""
        return None if request.parent_id is None else self.requests.get(request.parent_id)

    def seat(self, request: Request) -> None:
        """Give a waiting request, whose `kv` holds its cached prefix, a seat."""
        kv, stats = request.kv, self.counters
        if request.status is Status.WAITING:
            cached = kv.num_tokens
            request.num_cached_tokens = max(request.num_cached_tokens, min(cached, request.num_prompt_tokens))
            stats.prompt_tokens += request.num_prompt_tokens
            if self.cache.prefix_caching and self.parent(request) is None:
                stats.prefix_queries += request.num_tokens
                stats.prefix_hits += cached
        if kv.host:
            self.cache.swap_in(kv)
        request.num_computed_tokens = kv.num_tokens
        request.parent_id = None
        if request.reserve:
            self.cache.grow(kv, kv.num_tokens, request.reserve)
        self._run(request)

    def preempt(self, request: Request, plan: Plan) -> None:
        """Take a running request's seat and blocks; its KV moves to the host or is computed again later."""
        if self._swap and self.cache.swap_out(request.kv):
            request.num_computed_tokens = request.kv.host_tokens
            self.counters.swapped_blocks += len(request.kv.host)
        else:
            self.cache.release(request.kv)
            request.num_computed_tokens = 0
        self._unseat(request)
        plan.preempted.append(request.request_id)
        self.counters.preemptions += 1

    def wait_for_prefix(self, request: Request) -> None:
        """Count a step in which the request waits for a prefix that another one computes."""
        request.prefix_waits += 1
        self.counters.prefix_waits += 1

    def overtake(self, requests: Iterable[Request]) -> None:
        """Count a step in which later requests were seated before these."""
        for request in requests:
            request.overtaken += 1

    def change_weights(self, version: int) -> None:
        """Forget all KV: running requests wait, in their order, and compute all their tokens again."""
        for request in tuple(self.running):
            self._unseat(request)
        for request in self.waiting:
            self.cache.release(request.kv)
            request.num_computed_tokens = 0
            request.cache_key = request.cache_key._replace(weights_version=version)
            request.kv = CachedSequence(request.cache_key)
        self.cache.reset()

    def _run(self, request: Request) -> None:
        self.waiting.remove(request)
        request.status = Status.RUNNING
        insort(self.running, request, key=self.policy.key)

    def _unseat(self, request: Request) -> None:
        self.running.remove(request)
        request.status = Status.PREEMPTED
        request.epoch += 1
        insort(self.waiting, request, key=self.policy.key)

    # ---- tokens: planned, then computed

    def grant(self, request: Request, count: int, plan: Plan) -> None:
        """Plan `count` more tokens of a running request; the blocks for them are available."""
        kv = request.kv
        start = kv.num_tokens
        end = start + count
        known = len(request.token_ids)
        self.cache.grow(kv, end, request.reserve)
        self.cache.commit(kv, request.token_ids, known)
        samples = 0 if request.closing else max(end - (known + request.num_pending) + 1, 0)
        edits: list[LogitEdits | None] = []
        if samples and request.edits is not None:
            edits = [request.edits.current(known + request.num_pending - request.num_prompt_tokens)]
        plan.slices.append(make_slice(request, start, end, samples, edits))
        prompt_scores = max(min(end, request.num_prompt_tokens - 1) - max(start, request.num_scored), 0)
        if request.num_scored < request.score_end:
            request.num_scored = max(request.num_scored, min(end, request.score_end))
        if samples:
            request.num_pending += 1
        self.grants.append(Grant(request, request.epoch, start, end, samples, prompt_scores))
        self.counters.scheduled_tokens += count

    def draft(self, index: int, tokens: Sequence[int], plan: Plan) -> None:
        """Put drafts behind a grant, which has blocks for them, up to one that cannot come or ends the output."""
        grant, request = self.grants[index], self.grants[index].request
        drafts = list(itertools.takewhile(lambda token: token not in request.stop_ids, tokens))
        if request.mask is not None:
            drafts = drafts[: request.mask.allows(drafts)]
        end = grant.end + len(drafts)
        self._rewind(request, end)
        if drafts:
            edits = request.edits.behind(request.num_output_tokens, drafts) if request.edits is not None else []
            add_drafts(plan.slices[index], drafts, edits)
            request.spec_token_ids = drafts
            self.grants[index] = grant._replace(end=end, samples=1 + len(drafts), drafts=drafts)
            self.counters.scheduled_tokens += len(drafts)

    def written(self, request: Request) -> int:
        """Tokens of a running request that earlier plans compute: what a copy in this plan may read."""
        for grant in self.grants:
            if grant.request is request:
                return grant.start
        return request.kv.num_tokens

    def take_grants(self) -> list[Grant]:
        """What was granted since the last call: the grants of one plan."""
        grants, self.grants = self.grants, []
        return grants

    def complete(self, grant: Grant, result: SliceResult | None) -> RequestUpdate | None:
        """Count a grant's tokens as computed and append what was sampled, up to a stop; None where that is nothing.

        A beam gets no tokens here: its search chooses them.
        """
        request, epoch, start, end, samples, prompt_scores, drafts = grant
        if request.status is Status.FINISHED:
            self.counters.discarded_tokens += end - start
            return None
        if samples:
            request.num_pending -= 1
            request.spec_token_ids = []
        if request.epoch == epoch:
            request.num_computed_tokens = min(end, request.kv.num_tokens)
        if result is None or not (result.token_ids or result.scores or request.closing):
            return None
        update = RequestUpdate(
            request.request_id,
            request.group_id,
            [],
            [*result.scores[prompt_scores:], *result.logprobs],
            result.scores[:prompt_scores],
            request.num_cached_tokens,
        )
        if request.is_beam:
            request.parked = samples > 0
            return update
        if result.token_ids:
            known = len(request.token_ids)
            stand = self._absorb(request, result.token_ids, drafts)
            update.logprobs = update.logprobs[: len(update.logprobs) - len(result.token_ids) + stand]
            self._settle(request, drafts, known, update)
        self._give(request, update, end)
        return update

    def _absorb(self, request: Request, sampled: Sequence[int], drafts: Sequence[int]) -> int:
        """Append sampled and forced tokens while the drafts are the same, up to the end of the output.

        Row i has seen the first i drafts, so what it sampled counts where these are the new tokens so far. Returns how
        many rows count.
        """
        known, mask = len(request.token_ids), request.mask
        if mask is not None and mask.failed:
            request.closing, request.stop_reason = "error", mask.failed
            return 0
        rows = row = 0
        while not request.closing and row <= len(drafts) and request.token_ids[known:] == list(drafts[:row]):
            if row and mask is not None and not mask.allows((sampled[row],)):
                break  # nothing may come here, as the next step finds
            self._append(request, sampled[row])
            rows, row = rows + 1, len(request.token_ids) - known
            if request.num_forced and request.top is not None:
                break  # the forced tokens need scores, which a row that samples does not give
        return rows

    def _append(self, request: Request, token: int) -> None:
        """Append one sampled token, and the forced ones behind it."""
        tokens, mask = request.token_ids, request.mask
        request.num_forced = 0
        tokens.append(token)
        if request.edits is not None:
            request.edits.append(token)
        if token in request.stop_ids:
            request.closing, request.stop_reason = "stop", request.stop_ids[token]
        elif mask is None:
            if request.num_output_tokens >= request.max_output:
                request.closing = "length"
        else:
            mask.accept((token,))
            self._close_at_end(request)
            if not request.closing:
                request.num_scored = max(request.num_scored, len(tokens) - 1)
                run = mask.forced() if request.params.jump_forward else []
                mask.accept(run)
                self._extend_forced(request, run)

    def _settle(self, request: Request, drafts: Sequence[int], known: int, update: RequestUpdate) -> None:
        """Take back the KV of drafts that are not the tokens behind the `known` ones, and count those that are."""
        accepted = 0
        if drafts:
            accepted = common_prefix(drafts, request.token_ids[known:])
            computed = min(known + accepted, len(request.token_ids) - 1)  # the last one's row is to sample
            if request.num_forced and request.top is not None:
                computed = min(computed, request.num_scored)
            self._rewind(request, computed)
            request.num_computed_tokens = min(request.num_computed_tokens, computed)
            request.drafted_tokens += len(drafts)
            request.accepted_tokens += accepted
            self.counters.count_drafts(len(drafts), accepted)
            update.drafted, update.accepted = len(drafts), accepted
            update.drafts_at = known - request.num_prompt_tokens - request.num_given
        if self._speculator is not None and self.num_drafting:
            self._speculator.learn(request, drafts, accepted)
            request.drafting = self._speculator.waits(request)

    def _rewind(self, request: Request, num_tokens: int) -> None:
        """Take back the KV behind `num_tokens`. What the request has reserved stays with it."""
        self.cache.rewind(request.kv, num_tokens, request.reserve)

    def _extend_forced(self, request: Request, run: Sequence[int]) -> None:
        """Append forced tokens, which the mask has accepted, as far as the output may go."""
        room = request.max_output - request.num_output_tokens
        cut, run = len(run) > room, run[:room]
        request.token_ids.extend(run)
        if request.edits is not None:
            for token in run:
                request.edits.append(token)
        request.num_forced = len(run)
        request.forced_tokens += len(run)
        self.counters.forced_tokens += len(run)
        if cut:
            request.closing = "length"
        else:
            self._close_at_end(request)

    def _close_at_end(self, request: Request) -> None:
        """Say why a constrained output ends here, if it does."""
        mask = request.mask
        assert mask is not None
        if mask.failed:
            request.closing, request.stop_reason = "error", mask.failed
        elif mask.ended:
            request.closing = "stop"
        elif request.num_output_tokens >= request.max_output:
            request.closing = "length"

    def _give(self, request: Request, update: RequestUpdate, end: int) -> None:
        """Put the output tokens that were not given yet into an update, and end the request behind its last one.

        With log-probabilities, a forced token is given when its own is there; without, when the prompt is computed.
        """
        scored = request.params.logprobs is not None
        whole = end >= (request.score_end if scored else request.num_prompt_tokens - 1)
        count = request.num_output_tokens - request.num_given if whole else 0
        if scored:
            count = len(update.logprobs)
        else:
            update.logprobs = []  # of forced tokens, scored for the prompt's sake
        first = request.num_prompt_tokens + request.num_given
        update.token_ids = request.token_ids[first : first + count]
        request.num_given += count
        self.counters.generated_tokens += count
        if request.closing and request.num_given == request.num_output_tokens and whole:
            update.finish_reason, update.stop_reason = request.closing, request.stop_reason
            update.stop_token = bool(count) and update.token_ids[-1] in request.stop_ids
            self.finish(request, request.closing, request.stop_reason)
