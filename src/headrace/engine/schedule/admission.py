"""`Admission`: which waiting requests get a seat in a step, and how much of their prefix is cached."""

from __future__ import annotations

from headrace.cache.radix import RadixNode
from headrace.engine.schedule.batching import Batching
from headrace.engine.schedule.plan import Plan
from headrace.engine.schedule.pool import RequestPool
from headrace.engine.schedule.request import Request, Status

__all__ = ["Admission"]


class Admission:
    """Decides which requests get a seat; the `RequestPool` makes the changes. It has no state.

    A request is seated only if its known tokens (or its reservation) fit beside what the running ones still
    need for theirs, so that prompts do not evict each other. The first that does not fit stops the queue; one
    that waits for its parent, or for a prefix being computed, is skipped.
    """

    def __init__(self, pool: RequestPool, batching: Batching, prefix_patience: int) -> None:
        """A request waits at most `prefix_patience` steps for a prefix that another one is computing."""
        self._pool = pool
        self._cache = pool.cache
        self._batching = batching
        self._patience = prefix_patience

    def admit(self, plan: Plan, in_flight: int) -> None:
        """Seat and grant waiting requests in policy order, while seats, tokens and blocks last."""
        pool = self._pool
        self._admit_waiting(plan)
        while not plan.slices and not in_flight and pool.waiting and any(r.parked for r in pool.running):
            # No request can go on: preempt a beam that waits for its siblings, so that they get its blocks.
            pool.preempt(next(r for r in reversed(pool.running) if r.parked), plan)
            self._admit_waiting(plan)

    def preempt_for_priority(self, plan: Plan) -> None:
        """Preempt running requests of a higher priority number until the first waiting one can be seated."""
        pool, cache = self._pool, self._cache
        head = next((r for r in pool.waiting if not self._blocked(r)), None)
        if head is None or self._batching.joins_empty or head.reserve:
            return
        while pool.running and pool.running[-1].priority > head.priority:
            path = cache.match(head.token_ids, head.cache_key, self._cacheable(head))
            need = cache.blocks_for(head.num_tokens) - sum(node.locks > 0 for node in path)
            if len(pool.running) < pool.seats and pool.has_room(need + self._promised_blocks()):
                return
            pool.preempt(pool.running[-1], plan)

    def _admit_waiting(self, plan: Plan) -> None:
        pool, cache, batching = self._pool, self._cache, self._batching
        seats = pool.seats - len(pool.running)
        if seats <= 0 or not (batching.joins_empty or batching.first(1)):
            return
        groups = {request.group_id for request in pool.running}
        promised = self._promised_blocks()
        newest = -1
        for request in pool.policy.order(pool.waiting, seats, self._cached_tokens):
            if not batching.admits(request.group_id, groups) or self._blocked(request):
                continue
            path = cache.match(request.token_ids, request.cache_key, self._cacheable(request))
            if not batching.joins_empty and self._prefix_in_progress(request, path):
                pool.wait_for_prefix(request)
                continue
            if seats == 0 or not self._try_admit(request, path, promised, plan):
                break
            seats -= 1
            promised += cache.need(request.kv, max(request.num_tokens, request.reserve))
            groups.add(request.group_id)
            newest = max(newest, request.arrival)
        pool.overtake(pool.policy.overtaken(pool.waiting, newest))

    def _try_admit(self, request: Request, path: list[RadixNode], promised: int, plan: Plan) -> bool:
        """Seat one request if its blocks fit beside the `promised` ones; False, nothing changed, if not."""
        pool, cache, batching, kv = self._pool, self._cache, self._batching, request.kv
        parent = pool.parent(request)
        if parent is not None:
            cache.fork(parent.kv, kv, self._cacheable(request))
        else:
            cache.adopt(kv, path)
        count = batching.first(request.next_span(max(kv.num_tokens, kv.host_tokens)))
        need = cache.need(kv, max(request.num_tokens, request.reserve))
        # Block moves need a slice to go with, and a fork must copy its last block before the parent commits it.
        fits = count > 0 or (batching.joins_empty and not kv.host and parent is None)
        if not fits or not pool.has_room(need + promised):
            cache.drop_blocks(kv)
            return False
        pool.seat(request)
        batching.take(count)
        if count:
            pool.grant(request, count, plan)
        return True

    def _promised_blocks(self) -> int:
        """Blocks that running requests still need for the tokens they know."""
        size = self._cache.block_size
        short = (-(-max(r.num_tokens, r.reserve) // size) - len(r.kv.blocks) for r in self._pool.running)
        return sum(blocks for blocks in short if blocks > 0)

    def _cacheable(self, request: Request) -> int:
        """How many tokens may come from the cache: never the last one, and none that still needs a score."""
        return request.num_scored if request.num_scored < request.score_end else request.num_wanted - 1

    def _cached_tokens(self, request: Request) -> int:
        path = self._cache.match(request.token_ids, request.cache_key, self._cacheable(request))
        return len(path) * self._cache.block_size

    def _blocked(self, request: Request) -> bool:
        """Whether it waits for its own result, its beam search, or its parent's computing the prompt."""
        if request.num_pending or request.parked:
            return True
        parent = self._pool.parent(request)
        if parent is None:
            return False
        return parent.status is not Status.RUNNING or self._pool.written(parent) < self._cacheable(request)

    def _prefix_in_progress(self, request: Request, path: list[RadixNode]) -> bool:
        """Whether a running request is about to compute this one's next block, which may wait for it a while longer."""
        pool, size = self._pool, self._cache.block_size
        start = len(path) * size
        if not self._cache.prefix_caching or start + size > self._cacheable(request):
            return False
        if pool.parent(request) is not None or request.prefix_waits >= self._patience:
            return False
        key = request.token_ids[start : start + size]
        node = path[-1] if path else None
        for other in pool.running:
            kv = other.kv
            same = kv.node is node if node is not None else (kv.depth == 0 and kv.cache_key == request.cache_key)
            if same and kv.depth == len(path) and other.token_ids[start : start + size] == key:
                return True
        return False
