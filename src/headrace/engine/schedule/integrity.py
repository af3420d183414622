"""What must hold of a `RequestPool` between two calls, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.engine.schedule.pool import Grant, RequestPool
from headrace.engine.schedule.request import Status

__all__ = ["check_pool"]


def check_pool(pool: RequestPool, in_flight: Sequence[Grant]) -> None:
    """Raise AssertionError unless queues, requests, blocks and the grants in flight agree. Slow."""
    pool.cache.check_integrity([request.kv for request in pool.requests.values()])
    assert not pool.grants, "a grant that no plan carries"
    assert {r.request_id for r in (*pool.running, *pool.waiting)} == set(pool.requests), "a request in no queue"
    assert len(pool.running) + len(pool.waiting) == len(pool.requests), "a request in two queues"
    assert len(pool.running) <= pool.seats, "more running than seats"
    for queue in (pool.running, pool.waiting):
        keys = [pool.policy.key(request) for request in queue]
        assert keys == sorted(keys), "a queue out of order"
    sampling = [grant.request for grant in in_flight if grant.samples]
    for request in pool.requests.values():
        kv = request.kv
        running = request.status is Status.RUNNING
        assert running == any(request is r for r in pool.running), "status and queue differ"
        assert running or not kv.blocks, "a waiting request holds blocks"
        assert not kv.host or request.status is Status.PREEMPTED, "host slots of a request not swapped out"
        assert request.num_pending == sum(r is request for r in sampling), "pending tokens drifted"
        limit = request.num_tokens + request.num_pending + len(request.spec_token_ids)
        assert kv.num_tokens <= limit, "more scheduled than known"
        assert request.num_computed_tokens <= kv.num_tokens + kv.host_tokens, "computed past scheduled"
        held = len(kv.blocks) * pool.cache.block_size
        assert not running or request.is_beam or held >= request.reserve, "a reservation shrank"
