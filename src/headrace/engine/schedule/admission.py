"""`Admission`: which waiting requests get a seat in a step, and what of their prefix is already there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.cache.radix import RadixNode
from headrace.engine.schedule.plan import Plan
from headrace.engine.schedule.request import Request, Status

if TYPE_CHECKING:
    from headrace.engine.schedule.scheduler import Scheduler

__all__ = ["Admission"]


class Admission:
    """The part of the scheduler that seats requests. Keeps no state of its own.

    A request is seated only if its known tokens (or its reservation) fit beside what the running ones still
    need for theirs, so that prompts do not evict each other. The first that does not fit stops the queue; one
    that is *held*, for its parent or for a prefix being computed, is passed over.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def run(self, plan: Plan) -> None:
        """Seat and grant waiting requests in policy order, while seats, tokens and blocks last."""
        s = self._scheduler
        self._seat(plan)
        while not plan.slices and not s.in_flight and s.waiting and any(r.parked for r in s.running):
            # Nothing can move: beams that wait for their siblings give way to them.
            s.preempt(next(r for r in reversed(s.running) if r.parked), plan)
            self._seat(plan)

    def make_way(self, plan: Plan) -> None:
        """Preempt running requests of a higher priority number until the first waiting one can be seated."""
        s = self._scheduler
        head = next((r for r in s.waiting if not self._blocked(r)), None)
        if head is None or s.batching.joins_empty or s.config.reserve != "none":
            return
        while s.running and s.running[-1].priority > head.priority:
            path = s.cache.match(head.token_ids, head.cache_key, self._limit(head))
            need = s.cache.blocks_for(head.num_tokens) - sum(node.locks > 0 for node in path)
            if len(s.running) < s.batching.seats and need + self._promised() <= s.cache.available:
                return
            s.preempt(s.running[-1], plan)

    def _seat(self, plan: Plan) -> None:
        s = self._scheduler
        seats = s.batching.seats - len(s.running)
        if seats <= 0 or not (s.batching.joins_empty or s.batching.first(1)):
            return
        groups = {request.group_id for request in s.running}
        promised = self._promised()
        newest = -1
        for request in s.policy.order(s.waiting, seats, self._cached_tokens):
            if not s.batching.admits(request.group_id, groups) or self._blocked(request):
                continue
            path = s.cache.match(request.token_ids, request.cache_key, self._limit(request))
            if not s.batching.joins_empty and self._prefix_is_coming(request, path):
                continue
            if seats == 0 or not self._admit(request, path, promised, plan):
                break
            seats -= 1
            promised += s.cache.need(request.kv, max(request.num_tokens, request.reserve))
            groups.add(request.group_id)
            newest = max(newest, request.arrival)
        s.policy.admitted(s.waiting, newest)

    def _admit(self, request: Request, path: list[RadixNode], promised: int, plan: Plan) -> bool:
        """Seat one request if its blocks fit beside the `promised` ones; False, nothing changed, if not."""
        s = self._scheduler
        kv = request.kv
        parent = None if request.parent_id is None else s.requests.get(request.parent_id)
        if parent is not None:
            s.cache.fork(parent.kv, kv, request.num_tokens - 1)
        else:
            s.cache.adopt(kv, path)
        cached = kv.num_tokens
        count = s.batching.first(request.num_tokens - max(cached, kv.host_tokens))
        need = s.cache.need(kv, max(request.num_tokens, request.reserve))
        # Block moves need a slice to go with, and a fork must copy its last block before the parent commits it.
        seated = count > 0 or (s.batching.joins_empty and not kv.host and parent is None)
        if need + promised > s.cache.available or not seated:
            s.cache.drop_blocks(kv)
            return False
        if request.status is Status.WAITING:
            self._count(request, cached, parent is not None)
        if kv.host:
            s.cache.swap_in(kv)
        request.num_computed_tokens = kv.num_tokens
        request.parent_id = None
        s.waiting.remove(request)
        s.start(request)
        s.batching.take(count)
        if request.reserve:
            s.cache.grow(kv, kv.num_tokens, request.reserve)
        if count:
            s.grant(request, count, plan)
        return True

    def _count(self, request: Request, cached: int, forked: bool) -> None:
        s = self._scheduler
        stats = s.counters
        request.num_cached_tokens = max(request.num_cached_tokens, min(cached, request.num_prompt_tokens))
        stats.prompt_tokens += request.num_prompt_tokens
        if s.cache.prefix_caching and not forked:
            stats.prefix_queries += request.num_tokens
            stats.prefix_hits += cached

    def _promised(self) -> int:
        """Blocks that running requests still need for the tokens they know."""
        s = self._scheduler
        size = s.cache.block_size
        short = (-(-max(r.num_tokens, r.reserve) // size) - len(r.kv.blocks) for r in s.running)
        return sum(blocks for blocks in short if blocks > 0)

    def _limit(self, request: Request) -> int:
        """Tokens that may come from the cache: never the last, and only those whose scores are known."""
        last = request.num_prompt_tokens - 1
        return request.num_scored if request.num_scored < last else request.num_tokens - 1

    def _cached_tokens(self, request: Request) -> int:
        s = self._scheduler
        path = s.cache.match(request.token_ids, request.cache_key, self._limit(request))
        return len(path) * s.cache.block_size

    def _blocked(self, request: Request) -> bool:
        """Whether it waits for its own result, for its search, or for its parent to compute the prompt."""
        if request.num_pending or request.parked:
            return True
        if request.parent_id is None:
            return False
        s = self._scheduler
        parent = s.requests.get(request.parent_id)
        if parent is None:  # finished early: an ordinary request, whose prefix is in the tree
            request.parent_id = None
            return False
        return parent.status is not Status.RUNNING or s.written(parent) < request.num_tokens - 1

    def _prefix_is_coming(self, request: Request, path: list[RadixNode]) -> bool:
        """Whether a running request is about to compute this one's next block: worth a wait, bounded."""
        s = self._scheduler
        size = s.cache.block_size
        start = len(path) * size
        if start + size > self._limit(request) or request.parent_id is not None or not s.cache.prefix_caching:
            return False
        if request.prefix_waits >= s.config.prefix_patience:
            return False
        key = request.token_ids[start : start + size]
        node = path[-1] if path else None
        for other in s.running:
            kv = other.kv
            same = kv.node is node if node is not None else (kv.depth == 0 and kv.cache_key == request.cache_key)
            if same and kv.depth == len(path) and other.token_ids[start : start + size] == key:
                request.prefix_waits += 1
                s.counters.prefix_waits += 1
                return True
        return False
