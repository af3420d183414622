"""`Drafting`: which requests of a step get drafts behind their known tokens, and the blocks for them."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.cache.manager import BlockMoves
from headrace.engine.schedule.batching import Batching
from headrace.engine.schedule.plan import Plan
from headrace.engine.schedule.pool import Grant, RequestPool
from headrace.engine.schedule.speculator import Candidate, Speculator

__all__ = ["Chosen", "Drafting"]

Chosen = tuple[int, Candidate, int]
"""A grant of the plan, its request as the speculator sees it, and the drafts for which it has blocks."""


class Drafting:
    """Gives drafts what a step has left: its tokens and free blocks when all known tokens have theirs.

    So in its plan drafts never preempt, never evict a cached prefix, and never take a prompt's place. It has no state.
    """

    def __init__(self, pool: RequestPool, batching: Batching, speculator: Speculator) -> None:
        self._pool = pool
        self._batching = batching
        self._speculator = speculator

    def choose(self, plan: Plan) -> list[Chosen]:
        """Let the speculator choose the number of drafts of each request, and take their blocks."""
        spare = self._batching.spare
        found = [
            (i, Candidate(grant.request, room)) for i, grant in self._open(spare) if (room := self._room(grant)) > 0
        ]
        if not found:
            return []
        counts = self._speculator.choose([candidate for _, candidate in found], plan.num_tokens, spare)
        chosen = []
        for (i, candidate), count in zip(found, counts):
            grant = self._pool.grants[i]
            count = min(count, self._room(grant))  # earlier requests may have taken the free blocks
            if count > 0:
                self._pool.cache.grow(grant.request.kv, grant.end + count, grant.request.reserve)
                chosen.append((i, candidate, count))
        return chosen

    def draft(self, plan: Plan, chosen: Sequence[Chosen], moves: BlockMoves) -> None:
        """Put the drafts into the plan, which goes to the executor next."""
        each = self._speculator.propose([item[1] for item in chosen], [item[2] for item in chosen], moves)
        for (i, _, count), drafts in zip(chosen, each):
            self._pool.draft(i, drafts[:count], plan)
        self._speculator.began(plan.num_tokens)

    def ended(self, plan: Plan) -> None:
        """A plan has its result."""
        self._speculator.ended(plan.num_tokens)

    def _open(self, spare: int) -> list[tuple[int, Grant]]:
        """The grants that sample behind the last known token, as far as tokens are left for drafts."""
        if spare <= 0:
            return []
        return [
            (i, grant)
            for i, grant in enumerate(self._pool.grants)
            if grant.samples
            and grant.request.num_pending == 1
            and grant.end == grant.request.num_tokens
            and not grant.request.is_beam
        ]

    def _room(self, grant: Grant) -> int:
        """Drafts for which a request has room in its output, its reservation and the free blocks."""
        request, cache = grant.request, self._pool.cache
        slots = (len(request.kv.blocks) + cache.pool.num_free) * cache.block_size
        room = min(request.max_output - request.num_output_tokens - 1, slots - grant.end)
        return min(room, request.reserve - grant.end) if request.reserve else room
