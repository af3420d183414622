"""`Scheduler`: each step grants requests some of the tokens they know and have not computed.

There is no prefill phase and no decode phase. A chunk of a prompt, a decode, a request that comes back after
a preemption, a cached prefix and a draft are the same thing: known tokens run ahead of computed ones, or
computed ones start high. `schedule` makes a plan and counts its tokens as scheduled; `update` takes its
result and counts them as computed; up to `queue_depth` plans may lie between the two. Plain ints, no tensors,
no clock.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence

from headrace.cache.manager import CacheManager
from headrace.config import CacheConfig, SchedulerConfig
from headrace.engine.schedule.admission import Admission
from headrace.engine.schedule.batching import make_batching
from headrace.engine.schedule.edits import EditState
from headrace.engine.schedule.plan import Plan, SliceResult, StepResult
from headrace.engine.schedule.policies import make_policy
from headrace.engine.schedule.request import Request, RequestUpdate, Status
from headrace.engine.schedule.slices import make_slice
from headrace.engine.schedule.stats import SchedulerStats
from headrace.errors import RequestError

__all__ = ["Scheduler"]

Flight = tuple[Request, int, int, int, int]
"""A slice in flight: request, its epoch then, start, end, rows sampled."""


class Scheduler:
    """The queue, the running requests, and the plans in flight. The only one that changes a `Request`.

    `max_model_len` is cut to what the KV cache can hold for one request. `host_slots` blocks of host memory
    take what `preemption="swap"` moves out. Iteration-level scheduling as in Orca §3.2; preemption as in
    PagedAttention §4.5: the last to be served gives way, so the first always goes on.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        host_slots: int = 0,
        num_blocks: int = 0,
    ) -> None:
        self.config = config
        self.cache = CacheManager(num_blocks or cache.num_blocks, cache.block_size, host_slots, cache.prefix_caching)
        self.capacity = self.cache.pool.num_usable * cache.block_size
        self.context = max_model_len
        self.max_model_len = min(max_model_len, self.capacity)
        self.eos_token_ids = eos_token_ids
        self.policy = make_policy(config.policy, config.lpm_patience)
        self.batching = make_batching(config.batching, config.max_num_batched_tokens, config.max_num_seqs)
        self.requests: dict[int, Request] = {}
        """Every unfinished request by id."""
        self.running: list[Request] = []
        """In policy order."""
        self.waiting: list[Request] = []
        """In policy order."""
        self._flights: deque[tuple[Plan, list[Flight]]] = deque()
        self._flight: list[Flight] = []
        self.counters = SchedulerStats()
        self._arrivals = 0
        self._admission = Admission(self)

    # ---- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request; raises `RequestError`, with the numbers, if it can never run."""
        self._check(request)
        params = request.params
        room = self.max_model_len - request.num_prompt_tokens
        request.max_output = room if params.max_tokens is None else params.max_tokens
        request.reserve = self._reservation(request)
        if not params.ignore_eos:
            request.stop_ids.update(dict.fromkeys(self.eos_token_ids))
        request.stop_ids.update({token: token for token in params.stop_token_ids})
        if EditState.wanted(params) and not request.is_beam:
            request.edits = EditState(params, request.stop_ids, request.prompt_token_ids)
            for token in request.output_token_ids:
                request.edits.append(token)
        request.arrival = self._arrivals
        self._arrivals += 1
        self.requests[request.request_id] = request
        insort(self.waiting, request, key=self.policy.key)

    def abort(self, request_id: int) -> None:
        """Stop a request now and free what it holds; nothing happens if it is gone already."""
        self.finish(request_id, "abort")

    def finish(
        self, request_id: int, reason: str, stop_reason: int | str | None = None, keep_tokens: int | None = None
    ) -> None:
        """End an unfinished request from outside, as a stop string does; only `keep_tokens` of its output
        count.

        What a plan in flight still computes for it is discarded when the result comes.
        """
        request = self.requests.get(request_id)
        if request is None:
            return
        if keep_tokens is not None and keep_tokens < request.num_output_tokens:
            del request.token_ids[request.num_prompt_tokens + keep_tokens :]
            request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens)
        self._finish(request, reason, stop_reason)

    def fork(self, parent_id: int, child: Request) -> None:
        """Add `child`, whose tokens start with all of the parent's computed ones, sharing their blocks.

        It runs at once where there is a seat and the parent is running; otherwise it waits like any other
        request and finds its prefix in the tree. The parent must have no plan in flight.
        """
        parent = self.requests[parent_id]
        shared = parent.kv.num_tokens
        if parent.num_pending or child.token_ids[:shared] != parent.token_ids[:shared]:
            raise ValueError(f"request {child.request_id} cannot fork from {parent_id}: its tokens are not the same")
        self.add(child)
        if parent.status is Status.RUNNING and len(self.running) < self.batching.seats:
            self.waiting.remove(child)
            self.cache.fork(parent.kv, child.kv, shared)
            self.start(child)

    def extend(self, request_id: int, token_ids: Sequence[int]) -> None:
        """Append tokens chosen outside the sampler (a beam search): they become known."""
        request = self.requests[request_id]
        request.token_ids.extend(token_ids)
        request.parked = False

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.requests)

    @property
    def in_flight(self) -> int:
        """Plans whose results have not come yet."""
        return len(self._flights)

    @property
    def stats(self) -> SchedulerStats:
        """Gauges and counters; the same object every time, its gauges fresh."""
        stats, cache = self.counters, self.cache
        stats.num_running, stats.num_waiting = len(self.running), len(self.waiting)
        stats.kv_usage = cache.usage
        stats.held_slots, stats.used_slots = cache.held_blocks * cache.block_size, cache.filled_slots
        stats.cached_blocks = cache.tree.num_evictable
        stats.physical_blocks = cache.pool.num_owned - cache.tree.num_evictable
        return stats

    def reset_prefix_cache(self) -> int:
        """Forget every cached prefix that no running request holds; returns the blocks freed."""
        return self.cache.reset()

    def change_weights(self, version: int) -> None:
        """The model's weights are others from here on: what was computed counts no more, and nothing matches it.

        Running requests keep their seats' order and compute all they know again. No plan may be in flight.
        """
        if self._flights:
            raise ValueError("weights cannot change while a plan is in flight: take its results first")
        for request in tuple(self.running):
            self.running.remove(request)
            request.status = Status.PREEMPTED
            request.epoch += 1
            insort(self.waiting, request, key=self.policy.key)
        for request in self.waiting:
            self.cache.release(request.kv)
            request.num_computed_tokens = 0
            request.spec_token_ids = []
            request.kv.cache_key = request.cache_key = request.cache_key._replace(weights_version=version)
        self.cache.reset()

    # ---- one step

    def schedule(self) -> Plan:
        """The next plan. One without slices carries nothing and is not in flight: results are due first."""
        self.counters.steps += 1
        plan = Plan(self.counters.steps)
        self._flight = []
        if self.policy.preempts and self.waiting:
            self._admission.make_way(plan)
        remaining = [request.remaining() for request in self.running]
        granted = self.batching.share(remaining, [len(request.spec_token_ids) for request in self.running])
        crowded = False
        for request, count in zip(tuple(self.running), granted):
            if count and request.status is Status.RUNNING:
                need = self.cache.need(request.kv, max(request.kv.num_tokens + count, request.reserve))
                if need and need > self.cache.available:
                    crowded = True
                    if not self._make_space(need, request, plan):
                        continue
                self.grant(request, count, plan)
        if self.waiting and not crowded:
            self._admission.run(plan)
        return self._seal(plan)

    def update(self, plan: Plan, result: StepResult) -> list[RequestUpdate]:
        """Take the result of the oldest plan in flight; returns what it brought, by request."""
        if not plan.slices:
            return []
        if not self._flights or self._flights[0][0] is not plan or result.step != plan.step:
            raise ValueError(f"step {plan.step} with result {result.step} is not the oldest in flight")
        _, flight = self._flights.popleft()
        updates: list[RequestUpdate] = []
        for request, epoch, start, end, samples in flight:
            if request.status is Status.FINISHED:
                self.counters.discarded_tokens += end - start
                continue
            if samples:
                request.num_pending -= 1
            if request.epoch == epoch:
                request.num_computed_tokens = end
            got = result.slices.get(request.request_id)
            if got is not None and (got.token_ids or got.scores):
                updates.append(self._absorb(request, got, samples))
        return updates

    def _absorb(self, request: Request, got: SliceResult, samples: int) -> RequestUpdate:
        """Append what was sampled, up to a stop; a beam's tokens are for its search to choose."""
        update = RequestUpdate(
            request.request_id, request.group_id, got.token_ids, got.logprobs, got.scores, request.num_cached_tokens
        )
        if request.is_beam:
            update.token_ids = []
            request.parked = samples > 0
            return update
        tokens, edits = request.token_ids, request.edits
        last = request.num_prompt_tokens + request.max_output
        for i, token in enumerate(got.token_ids):
            tokens.append(token)
            if edits is not None:
                edits.append(token)
            if token in request.stop_ids or len(tokens) >= last:
                update.token_ids = got.token_ids[: i + 1]
                update.logprobs = got.logprobs[: i + 1]
                stopped = token in request.stop_ids
                update.finish_reason = "stop" if stopped else "length"
                update.stop_reason = request.stop_ids.get(token)
                break
        self.counters.generated_tokens += len(update.token_ids)
        if update.finish_reason is not None:
            self._finish(request, update.finish_reason, update.stop_reason)
        elif samples > 1:  # drafts: what was not accepted is taken back
            request.spec_token_ids = []
            self.cache.rewind(request.kv, len(tokens) - 1)
            request.num_computed_tokens = min(request.num_computed_tokens, len(tokens) - 1)
        return update

    # ---- moves of one request, shared with admission

    def start(self, request: Request) -> None:
        """Seat a request, in policy order."""
        request.status = Status.RUNNING
        insort(self.running, request, key=self.policy.key)

    def grant(self, request: Request, count: int, plan: Plan) -> None:
        """Give a seated request `count` tokens of this step; the blocks for them are available."""
        kv = request.kv
        start = kv.num_tokens
        end = start + count
        known = len(request.token_ids)
        self.cache.grow(kv, end, request.reserve)
        self.cache.commit(kv, request.token_ids, known)
        samples = end - (known + request.num_pending) + 1
        plan.slices.append(make_slice(request, start, end))
        if samples > 0:
            request.num_pending += 1
        self._flight.append((request, request.epoch, start, end, max(samples, 0)))
        self.counters.scheduled_tokens += count

    def preempt(self, request: Request, plan: Plan) -> None:
        """Take a running request's seat and blocks, which go to the host or are computed again later."""
        self.running.remove(request)
        if self.config.preemption == "swap" and self.cache.swap_out(request.kv):
            request.num_computed_tokens = request.kv.host_tokens
            self.counters.swapped_blocks += len(request.kv.host)
        else:
            self.cache.release(request.kv)
            request.num_computed_tokens = 0
        request.status = Status.PREEMPTED
        request.epoch += 1
        request.spec_token_ids = []
        insort(self.waiting, request, key=self.policy.key)
        plan.preempted.append(request.request_id)
        self.counters.preemptions += 1

    def written(self, request: Request) -> int:
        """Tokens of a running request that earlier plans compute: what a copy in this plan may read."""
        for other, _, start, _, _ in self._flight:
            if other is request:
                return start
        return request.kv.num_tokens

    def _make_space(self, need: int, request: Request, plan: Plan) -> bool:
        """Preempt until `need` blocks are available; False when `request` itself had to go.

        Blocks are granted in policy order, so those behind `request` have nothing in this plan yet.
        """
        while need > self.cache.available:
            victim = self.running[-1]
            self.preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _seal(self, plan: Plan) -> Plan:
        if not plan.slices:  # blocks swapped out in it leave with the next plan: nothing writes before that
            return plan
        moves = self.cache.end_step()
        plan.swap_out, plan.swap_in, plan.copies = moves.swap_out, moves.swap_in, moves.copies
        stats = self.counters
        stats.copied_blocks += len(moves.copies)
        stats.swapped_blocks += len(moves.swap_in)
        stats.held_slot_steps += self.cache.held_blocks * self.cache.block_size
        stats.used_slot_steps += self.cache.filled_slots
        self._flights.append((plan, self._flight))
        self._flight = []
        return plan

    def _finish(self, request: Request, reason: str, stop_reason: int | str | None) -> None:
        (self.running if request.status is Status.RUNNING else self.waiting).remove(request)
        self.cache.commit(request.kv, request.token_ids, request.num_tokens)  # planned ahead, known only now
        self.cache.release(request.kv)
        request.status = Status.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        if not request.is_beam:  # beams come and go within their search
            self.counters.finished[reason] += 1
        del self.requests[request.request_id]

    # ---- admission's arithmetic

    def _check(self, request: Request) -> None:
        params, prompt = request.params, request.num_prompt_tokens
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id} is already in use")
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
        output = self.max_model_len - prompt if params.max_tokens is None else params.max_tokens
        if request.num_output_tokens >= output:
            raise RequestError(f"the request has {request.num_output_tokens} of {output} output tokens: it is done")
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)}
        if params.min_tokens and params.allowed_token_ids is not None and ends.issuperset(params.allowed_token_ids):
            raise RequestError(f"min_tokens={params.min_tokens} bans every one of allowed_token_ids")

    def _reservation(self, request: Request) -> int:
        """Tokens reserved at admission: the baselines of PagedAttention §6.1."""
        output = request.max_output
        kind = self.config.reserve
        if kind == "max":
            return self.max_model_len
        if kind == "pow2":
            return min(self.max_model_len, request.num_prompt_tokens + (1 << (output - 1).bit_length()))
        return request.num_prompt_tokens + output if kind == "oracle" else 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, requests, blocks and counters agree. For tests: slow."""
        self.cache.check_integrity([request.kv for request in self.requests.values()])
        assert {r.request_id for r in (*self.running, *self.waiting)} == set(self.requests), "a request in no queue"
        assert len(self.running) + len(self.waiting) == len(self.requests), "a request in two queues"
        assert len(self.running) <= self.batching.seats, "more running than seats"
        for queue in (self.running, self.waiting):
            keys = [self.policy.key(request) for request in queue]
            assert keys == sorted(keys), "a queue out of order"
        flying = [item[0] for _, flight in self._flights for item in flight if item[4]]
        for request in self.requests.values():
            kv = request.kv
            running = request.status is Status.RUNNING
            assert running == any(request is r for r in self.running), "status and queue differ"
            assert running or not kv.blocks, "a waiting request holds blocks"
            assert not kv.host or request.status is Status.PREEMPTED, "host slots of a request not swapped out"
            assert request.num_pending == sum(r is request for r in flying), "pending tokens drifted"
            limit = request.num_tokens + request.num_pending + len(request.spec_token_ids)
            assert kv.num_tokens <= limit, "more scheduled than known"
            assert request.num_computed_tokens <= kv.num_tokens + kv.host_tokens, "computed past scheduled"
            held = len(kv.blocks) * self.cache.block_size
            assert not running or request.is_beam or held >= request.reserve, "a reservation shrank"
