"""`RadixTree`: the KV blocks of finished and running requests, by their tokens (RadixAttention, SGLang §3).

Every edge is one whole block, so a node *is* a block and nothing is ever split:

    root(cache_key) ── tokens 0..15 ──> node ── tokens 16..31 ──> node ── …
                                          └──── tokens 16..31' ─> node

A running request locks the nodes of its path. Unlocked nodes stay until the pool needs room; then leaves are
evicted, the least recently used one first, by a logical clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush

from headrace.cache.blocks import BlockPool
from headrace.cache.key import CacheKey

__all__ = ["RadixNode", "RadixTree"]

_SLACK = 256


class RadixNode:
    """One block of tokens below `parent`; a root has block 0, no parent. `locks` counts paths through it."""

    __slots__ = ("block", "cache_key", "children", "key", "last_used", "locks", "parent")

    def __init__(self, key: tuple[int, ...], block: int, parent: RadixNode | None, cache_key: CacheKey) -> None:
        self.key = key
        self.block = block
        self.parent = parent
        self.cache_key = cache_key
        self.children: dict[tuple[int, ...], RadixNode] = {}
        self.locks = 0
        self.last_used = 0


class RadixTree:
    """A trie of whole blocks that shares one `BlockPool` with running requests; it owns one count per block.

    Each `CacheKey` has a root of its own. Matching reads each token once. Eviction pops a heap whose stale
    entries are skipped: O(log n) a block.
    """

    __slots__ = ("_clock", "_heap", "_pushes", "_roots", "block_size", "num_evictable", "num_nodes", "pool")

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.num_nodes = 0
        self.num_evictable = 0
        """Unlocked nodes. All of them can be evicted, and each frees a block."""
        self._roots: dict[CacheKey, RadixNode] = {}
        self._heap: list[tuple[int, int, RadixNode]] = []
        self._clock = 0
        self._pushes = 0

    def root(self, cache_key: CacheKey) -> RadixNode:
        """The root of `cache_key`, made when it is new. An unlocked root is removed with its last child."""
        node = self._roots.get(cache_key)
        if node is None:
            node = self._roots[cache_key] = RadixNode((), 0, None, cache_key)
        return node

    def match(self, token_ids: Sequence[int], cache_key: CacheKey, limit: int) -> list[RadixNode]:
        """The nodes that hold the longest known prefix of `token_ids[:limit]`, in order. Locks nothing."""
        node = self._roots.get(cache_key)
        path: list[RadixNode] = []
        if node is None:
            return path
        size = self.block_size
        for end in range(size, min(limit, len(token_ids)) + 1, size):
            node = node.children.get(tuple(token_ids[end - size : end]))
            if node is None:
                break
            path.append(node)
        return path

    def extend(self, parent: RadixNode, key: tuple[int, ...], block: int) -> RadixNode:
        """The child of a locked `parent` for `key`, locked once more; `block` becomes it if there is none."""
        node = parent.children.get(key)
        if node is None:
            self.pool.incref(block)
            node = parent.children[key] = RadixNode(key, block, parent, parent.cache_key)
            self.num_nodes += 1
            self.num_evictable += 1
        self._lock(node)
        return node

    def lock(self, node: RadixNode) -> None:
        """Lock `node` and everything above it, the root included."""
        at: RadixNode | None = node
        while at is not None:
            self._lock(at)
            at = at.parent

    def unlock(self, node: RadixNode) -> None:
        """Take back one `lock(node)`; what becomes unlocked counts as used now."""
        self._clock += 1
        at: RadixNode | None = node
        while at is not None:
            parent = at.parent
            self._unlock(at)
            at = parent

    def unlock_tail(self, node: RadixNode) -> RadixNode:
        """Take back the lock on `node` alone and return its parent, which stays locked."""
        parent = node.parent
        assert parent is not None, "a root is no tail"
        self._clock += 1
        self._unlock(node)
        return parent

    def evict(self, count: int) -> int:
        """Drop up to `count` unlocked leaves, least recently used first; returns how many."""
        done = 0
        while done < count and self._heap:
            used, _, node = heappop(self._heap)
            if node.locks or node.children or node.last_used != used or node.parent is None:
                continue
            self._remove(node)
            done += 1
        return done

    def nodes(self) -> Iterator[RadixNode]:
        """Every node but the roots, parents first."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    def _lock(self, node: RadixNode) -> None:
        if node.locks == 0 and node.parent is not None:
            self.num_evictable -= 1
        node.locks += 1

    def _unlock(self, node: RadixNode) -> None:
        node.locks -= 1
        if node.locks:
            return
        if node.parent is not None:
            self.num_evictable += 1
            node.last_used = self._clock
        self._offer(node)

    def _offer(self, node: RadixNode) -> None:
        """Make an unlocked leaf a candidate for eviction; an empty root is removed at once."""
        if node.locks or node.children:
            return
        if node.parent is None:
            self._roots.pop(node.cache_key, None)
            return
        self._pushes += 1
        heappush(self._heap, (node.last_used, self._pushes, node))
        if len(self._heap) > 2 * self.num_nodes + _SLACK:
            self._compact()

    def _remove(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        node.parent = None
        self.num_nodes -= 1
        self.num_evictable -= 1
        self.pool.decref(node.block)
        self._offer(parent)

    def _compact(self) -> None:
        seen: dict[int, tuple[int, int, RadixNode]] = {}
        for entry in self._heap:
            used, _, node = entry
            if not (node.locks or node.children or node.last_used != used or node.parent is None):
                seen[id(node)] = entry
        self._heap = list(seen.values())
        heapify(self._heap)

    def check_integrity(self) -> None:
        """Raise AssertionError unless links, locks, counts and the eviction heap agree."""
        offered = {id(node) for used, _, node in self._heap if node.last_used == used}
        count = evictable = 0
        blocks: set[int] = set()
        for node in self.nodes():
            parent = node.parent
            assert parent is not None and parent.children.get(node.key) is node, "a child that its parent does not list"
            assert len(node.key) == self.block_size, "an edge that is not a whole block"
            assert node.block not in blocks, f"block {node.block} is twice in the tree"
            assert self.pool.refs[node.block] >= 1, f"block {node.block} is in the tree and free"
            assert node.locks >= sum(child.locks for child in node.children.values()), "a lock skips its parents"
            blocks.add(node.block)
            count += 1
            evictable += node.locks == 0
            if not node.locks and not node.children:
                assert id(node) in offered, "an unlocked leaf that eviction cannot find"
        assert (count, evictable) == (self.num_nodes, self.num_evictable), "node counts drifted"
        for root in self._roots.values():
            assert root.locks or root.children, "an empty root stayed"
