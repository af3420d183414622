"""`Scheduler`: each step grants requests some of the tokens they know and have not computed.

There is no prefill phase and no decode phase. A chunk of a prompt, a decode, a request that comes back after
a preemption, a cached prefix and a draft are the same thing: known tokens run ahead of computed ones, or
computed ones start high. `schedule` makes a plan and counts its tokens as scheduled; `update` takes its
result and counts them as computed; up to `queue_depth` plans may lie between the two. Plain ints, no tensors,
no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from headrace.cache.manager import CacheManager
from headrace.config import CacheConfig
from headrace.engine.schedule.admission import Admission
from headrace.engine.schedule.batching import BATCHING, Batching
from headrace.engine.schedule.config import SchedulerConfig
from headrace.engine.schedule.drafting import Drafting
from headrace.engine.schedule.integrity import check_pool
from headrace.engine.schedule.limits import RequestLimits
from headrace.engine.schedule.mask import MaskFactory, no_masks
from headrace.engine.schedule.plan import Plan, StepResult
from headrace.engine.schedule.policies import POLICIES
from headrace.engine.schedule.pool import Grant, RequestPool
from headrace.engine.schedule.request import Request, RequestUpdate, Status
from headrace.engine.schedule.speculator import Speculator
from headrace.engine.schedule.stats import SchedulerStats

__all__ = ["Scheduler"]


class Scheduler:
    """Plans steps over a `RequestPool`, the one place where a `Request` changes.

    Iteration-level scheduling as in Orca §3.2; preemption as in PagedAttention §4.5: the request served last is
    preempted first, so the one served first always progresses.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        host_slots: int = 0,
        num_blocks: int = 0,
        batching: Batching | None = None,
        masks: MaskFactory = no_masks,
        speculator: Speculator | None = None,
    ) -> None:
        """`max_model_len` is cut to what the KV cache can hold for one request. `host_slots` blocks of host memory
        take what `preemption="swap"` moves out. `batching` replaces the policy that `config` names. `masks` builds the
        masks of constrained requests. `speculator` proposes drafts.
        """
        self.cache = CacheManager(num_blocks or cache.num_blocks, cache.block_size, host_slots, cache.prefix_caching)
        self.batching = batching or BATCHING[config.batching](config.max_num_batched_tokens, config.max_num_seqs)
        self.limits = RequestLimits(
            max_model_len, self.cache.pool.num_usable * cache.block_size, eos_token_ids, config.reserve
        )
        policy = POLICIES[config.policy](config.lpm_patience)
        swap = config.preemption == "swap"
        self.pool = RequestPool(
            self.cache,
            policy,
            self.limits,
            self.batching.seats,
            swap,
            masks,
            config.jump_forward == "stepwise",
            speculator,
        )
        self._drafting = None if speculator is None else Drafting(self.pool, self.batching, speculator)
        self._admission = Admission(self.pool, self.batching, config.prefix_patience)
        self._in_flight: deque[tuple[Plan, list[Grant]]] = deque()

    # ---- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request; raises `RequestError`, with the numbers, if it can never run."""
        self.pool.add(request)

    def abort(self, request_id: int) -> None:
        """Stop a request now and free what it holds; a no-op if it has finished."""
        self.finish(request_id, "abort")

    def finish(
        self, request_id: int, reason: str, stop_reason: int | str | None = None, keep_tokens: int | None = None
    ) -> None:
        """End an unfinished request from outside, as a stop string does; only `keep_tokens` of its output count.

        What a plan in flight still computes for it is discarded when the result comes.
        """
        request = self.pool.requests.get(request_id)
        if request is not None:
            self.pool.finish(request, reason, stop_reason, keep_tokens)

    def fork(self, parent_id: int, child: Request) -> None:
        """Add `child`. Its tokens start with the parent's computed ones, and it shares their blocks.

        It runs at once where there is a seat and the parent is running; otherwise it waits like any other
        request and finds its prefix in the tree. The parent must have no plan in flight.
        """
        self.pool.fork(parent_id, child)

    def extend(self, request_id: int, token_ids: Sequence[int], cumulative_logprob: float) -> None:
        """Append tokens that a beam search has chosen; `cumulative_logprob` is that of the whole output."""
        self.pool.extend(request_id, token_ids, cumulative_logprob)

    @property
    def requests(self) -> Mapping[int, Request]:
        """Every unfinished request by id, to be read."""
        return self.pool.requests

    @property
    def running(self) -> Sequence[Request]:
        """Requests with a seat, in policy order."""
        return self.pool.running

    @property
    def waiting(self) -> Sequence[Request]:
        """Requests without one, in policy order."""
        return self.pool.waiting

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and output together."""
        return self.limits.max_model_len

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.pool.requests)

    @property
    def in_flight(self) -> int:
        """Number of plans without a result yet."""
        return len(self._in_flight)

    @property
    def stats(self) -> SchedulerStats:
        """Gauges and counters; the same object every time, its gauges fresh."""
        stats, cache = self.pool.counters, self.cache
        stats.num_running, stats.num_waiting = len(self.pool.running), len(self.pool.waiting)
        stats.kv_usage = cache.usage
        stats.held_slots, stats.used_slots = cache.held_blocks * cache.block_size, cache.filled_slots
        stats.cached_blocks = cache.tree.num_evictable
        stats.physical_blocks = cache.pool.num_owned - cache.tree.num_evictable
        return stats

    def reset_prefix_cache(self) -> int:
        """Forget every cached prefix that no running request holds; returns the blocks freed."""
        return self.cache.reset()

    def change_weights(self, version: int) -> None:
        """Forget all KV, as the model has other weights now; `version` is theirs.

        Running requests wait, in their order, and compute all their tokens again. No plan may be in flight.
        """
        if self._in_flight:
            raise ValueError("weights cannot change while a plan is in flight: take its results first")
        self.pool.change_weights(version)

    # ---- one step

    def schedule(self) -> Plan:
        """Make the next plan. One without slices is not in flight: nothing can be computed before a result comes."""
        pool = self.pool
        pool.counters.steps += 1
        plan = Plan(pool.counters.steps)
        if pool.policy.preempts and pool.waiting:
            self._admission.preempt_for_priority(plan)
        crowded = self._grant_running(plan)
        if pool.waiting and not crowded:
            self._admission.admit(plan, len(self._in_flight))
        return self._seal(plan)

    def _grant_running(self, plan: Plan) -> bool:
        """Share the step's tokens among the running requests; True where blocks ran out and some were preempted."""
        pool, cache = self.pool, self.cache
        running = tuple(pool.running)
        remaining = [request.remaining() for request in running]
        granted = self.batching.share(remaining, [request.num_forced for request in running])
        crowded = False
        for request, count in zip(running, granted):
            if count and request.status is Status.RUNNING:
                need = cache.need(request.kv, max(request.kv.num_tokens + count, request.reserve))
                if need and not pool.has_room(need):
                    crowded = True
                    if not self._make_space(need, request, plan):
                        continue
                pool.grant(request, count, plan)
        return crowded

    def update(self, plan: Plan, result: StepResult) -> list[RequestUpdate]:
        """Take the result of the oldest plan in flight; returns an update for each request that got anything."""
        if not plan.slices:
            return []
        if not self._in_flight or self._in_flight[0][0] is not plan or result.step != plan.step:
            raise ValueError(f"step {plan.step} with result {result.step} is not the oldest in flight")
        _, grants = self._in_flight.popleft()
        if self._drafting is not None:
            self._drafting.ended(plan)
        complete, results = self.pool.complete, result.slices
        updates = [complete(grant, results.get(grant[0].request_id)) for grant in grants]
        return [update for update in updates if update is not None]

    def _make_space(self, need: int, request: Request, plan: Plan) -> bool:
        """Preempt until `need` blocks are available; False where `request` itself was preempted.

        Blocks are granted in policy order, so those behind `request` have nothing in this plan yet.
        """
        while not self.pool.has_room(need):
            victim = self.pool.running[-1]
            self.pool.preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _seal(self, plan: Plan) -> Plan:
        if not plan.slices:  # its swap-outs go with the next plan: no block is written before that
            return plan
        chosen = self._drafting.choose(plan) if self._drafting is not None and self.pool.num_drafting else []
        moves = self.cache.end_step()
        plan.swap_out, plan.swap_in, plan.copies = moves.swap_out, moves.swap_in, moves.copies
        if self._drafting is not None:
            self._drafting.draft(plan, chosen, moves)
        counters = self.pool.counters
        counters.copied_blocks += len(moves.copies)
        counters.swapped_blocks += len(moves.swap_in)
        counters.held_slot_steps += self.cache.held_blocks * self.cache.block_size
        counters.used_slot_steps += self.cache.filled_slots
        self._in_flight.append((plan, self.pool.take_grants()))
        return plan

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, requests, blocks and plans in flight agree. For tests: slow."""
        check_pool(self.pool, [grant for _, grants in self._in_flight for grant in grants])
