"""`CacheManager`: the only owner of KV blocks, which sequences match, grow, commit, fork, rewind, swap and release.

A sequence of 40 tokens with blocks of 16; `depth` blocks of it are in the tree, locked by it:

    position   0               16              32        40      48
    blocks     [ tree, shared ][ tree, shared ][ private         ]
               <------- depth = 2 ------------>
               <------------- num_tokens = 40 ---------->

Plans run in the order they were made, so a block freed here may be given to a later plan at once, and a block
whose tokens are all known enters the tree in the very step that computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.cache.blocks import BlockPool, OutOfBlocksError
from headrace.cache.key import CacheKey
from headrace.cache.radix import RadixNode, RadixTree

__all__ = ["BlockMoves", "CacheManager", "CachedSequence", "Segment"]


@dataclass(slots=True)
class Segment:
    """A range of a sequence's KV from token `start` on, in the blocks of instance `owner` (0 is this one)."""

    owner: int
    start: int
    blocks: list[int]


class CachedSequence:
    """One sequence's KV. The manager alone writes its fields; `blocks` is the live block table."""

    __slots__ = ("blocks", "cache_key", "depth", "host", "host_tokens", "node", "num_tokens", "segments")

    def __init__(self, cache_key: CacheKey) -> None:
        self.cache_key = cache_key
        self.blocks: list[int] = []
        self.segments = [Segment(0, 0, self.blocks)]
        self.num_tokens = 0
        """Tokens whose KV is in the blocks, or will be once the plans made so far have run."""
        self.node: RadixNode | None = None
        """The deepest locked node; None while nothing is held, or without prefix caching."""
        self.depth = 0
        """Blocks of the locked path. After a fork or a rewind the sequence may use only part of the last one."""
        self.host: list[int] = []
        """Host slots of a swapped-out sequence, one per block from position 0."""
        self.host_tokens = 0


@dataclass(slots=True)
class BlockMoves:
    """Block moves of one step, in the order the runner does them: to the host, from it, then copies."""

    swap_out: list[tuple[int, int]] = field(default_factory=list)
    """(block, host slot)"""
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    """(host slot, block)"""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source block, target block)"""


class CacheManager:
    """Blocks of `block_size` tokens in one pool, shared by running sequences and the prefix tree.

    `num_blocks` counts the null block 0. Callers compare `need` with `available` before they grow a sequence.
    """

    def __init__(self, num_blocks: int, block_size: int, host_slots: int = 0, prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.tree = RadixTree(self.pool, block_size)
        self.host = BlockPool(host_slots, first=0)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.held_blocks = 0
        """Σ len(blocks) over sequences: a shared block counts once for each."""
        self.filled_slots = 0
        """Σ num_tokens over sequences. held_blocks · block_size − filled_slots is reserved and unused."""
        self._moves = BlockMoves()
        self._pins: list[tuple[int, RadixNode | None]] = []
        self._pinned: dict[int, int] = {}
        self._slots_leaving: list[int] = []

    @property
    def available(self) -> int:
        """Blocks that can be allocated now: free and evictable ones."""
        return self.pool.num_free + self.tree.num_evictable

    @property
    def usage(self) -> float:
        """Share of the pool that requests hold; what only the tree keeps does not count."""
        return 1.0 - self.available / self.pool.num_usable

    def blocks_for(self, num_tokens: int) -> int:
        """⌈num_tokens / block_size⌉."""
        return -(-num_tokens // self.block_size)

    def match(self, token_ids: Sequence[int], cache_key: CacheKey, limit: int) -> list[RadixNode]:
        """The tree's nodes for the longest cached prefix of `token_ids[:limit]`; locks nothing."""
        return self.tree.match(token_ids, cache_key, limit) if self.prefix_caching else []

    def adopt(self, seq: CachedSequence, path: Sequence[RadixNode]) -> None:
        """Give an empty sequence the matched blocks of `path`, locked: it starts at their end."""
        assert not seq.blocks and seq.node is None, "only an empty sequence adopts"
        if not self.prefix_caching:
            return
        seq.node = path[-1] if path else self.tree.root(seq.cache_key)
        self.tree.lock(seq.node)
        for node in path:
            self.pool.incref(node.block)
            seq.blocks.append(node.block)
        seq.depth = len(path)
        seq.num_tokens = len(path) * self.block_size
        self.held_blocks += len(path)
        self.filled_slots += seq.num_tokens

    def need(self, seq: CachedSequence, end: int) -> int:
        """Blocks that `grow(seq, end)` takes, a copy-on-write one included."""
        blocks = seq.blocks
        first = seq.num_tokens // self.block_size
        count = -(-end // self.block_size) - len(blocks)
        if count < 0:
            count = 0
        if first < len(blocks) and self.pool.refs[blocks[first]] > 1 and self._shared(blocks[first]):
            count += 1
        return count

    def grow(self, seq: CachedSequence, end: int, reserve: int = 0) -> None:
        """Make room to write tokens [num_tokens, end) (append), and take blocks for `reserve` tokens in all.

        A shared block that would be written is copied first; its source stays pinned until `end_step`.
        """
        blocks = seq.blocks
        first = seq.num_tokens // self.block_size
        if first < len(blocks):
            self._own(seq, first)
        wanted = -(-max(end, reserve) // self.block_size)
        while len(blocks) < wanted:
            blocks.append(self._allocate())
            self.held_blocks += 1
        self.filled_slots += end - seq.num_tokens
        seq.num_tokens = end

    def commit(self, seq: CachedSequence, token_ids: Sequence[int], known: int) -> None:
        """Put the full blocks of the first `known` tokens into the tree, as far as they are computed or planned.

        Where the tree has a block for these tokens already, it keeps that one and the sequence its own: their bits
        are equal.
        """
        size = self.block_size
        full = min(known, seq.num_tokens) // size
        if seq.depth >= full or not self.prefix_caching:
            return
        node = seq.node
        assert node is not None, "a sequence adopts before it commits"
        for i in range(seq.depth, full):
            node = self.tree.extend(node, tuple(token_ids[i * size : (i + 1) * size]), seq.blocks[i])
        seq.node, seq.depth = node, full

    def fork(self, parent: CachedSequence, child: CachedSequence, num_tokens: int) -> None:
        """Let an empty `child` share the parent's first `num_tokens` tokens, the partial block included.

        An earlier plan must have written that block, and the child must grow, or be released, before the parent
        commits it.
        """
        count = self.blocks_for(num_tokens)
        assert not child.blocks and child.node is None, "only an empty sequence is forked into"
        assert num_tokens <= parent.num_tokens, f"fork at {num_tokens} of {parent.num_tokens} tokens"
        if self.prefix_caching:
            assert parent.node is not None and num_tokens // self.block_size <= parent.depth, "fork before commit"
            node = parent.node
            for _ in range(parent.depth - min(parent.depth, count)):
                assert node.parent is not None
                node = node.parent
            self.tree.lock(node)
            child.node, child.depth = node, min(parent.depth, count)
        for block in parent.blocks[:count]:
            self.pool.incref(block)
            child.blocks.append(block)
        child.num_tokens = num_tokens
        self.held_blocks += count
        self.filled_slots += num_tokens

    def rewind(self, seq: CachedSequence, num_tokens: int, reserve: int = 0) -> None:
        """Take back all but the first `num_tokens` tokens, on the device or, swapped out, on the host.

        Device blocks for `reserve` tokens stay; the tokens that leave them must not have been known.
        """
        keep = self.blocks_for(num_tokens)
        if seq.host_tokens > num_tokens:
            for slot in seq.host[keep:]:
                self.host.decref(slot)
            del seq.host[keep:]
            seq.host_tokens = num_tokens
        if seq.num_tokens <= num_tokens:
            return
        self._unlock_to(seq, keep)
        stay = max(keep, self.blocks_for(reserve))
        for block in seq.blocks[stay:]:
            self.pool.decref(block)
            self.held_blocks -= 1
        del seq.blocks[stay:]
        self.filled_slots -= seq.num_tokens - num_tokens
        seq.num_tokens = num_tokens

    def release(self, seq: CachedSequence) -> None:
        """Free the sequence's blocks and host slots; blocks in the tree stay there, evictable."""
        self.drop_blocks(seq)
        for slot in seq.host:
            self.host.decref(slot)
        seq.host = []
        seq.host_tokens = 0

    def drop_blocks(self, seq: CachedSequence) -> None:
        """Free the device blocks and keep the host slots: after a failed admission or a swap to the host."""
        for block in seq.blocks:
            self.pool.decref(block)
        if seq.node is not None:
            self.tree.unlock(seq.node)
        self.held_blocks -= len(seq.blocks)
        self.filled_slots -= seq.num_tokens
        seq.blocks = []  # a new list: a plan in flight may refer to the old one
        seq.segments = [Segment(0, 0, seq.blocks)]
        seq.node = None
        seq.depth = seq.num_tokens = 0

    def swap_out(self, seq: CachedSequence) -> bool:
        """Move the sequence to host slots; returns False, with nothing changed, when there are too few.

        Every block moves, those in the tree too: they become evictable, and may be evicted before the sequence
        returns. Earlier plans have written them all, as the runner swaps out before it computes.
        """
        count = self.blocks_for(seq.num_tokens)
        if count == 0 or count > self.host.num_free:
            return False
        seq.host = [self.host.allocate() for _ in range(count)]
        seq.host_tokens = seq.num_tokens
        self._moves.swap_out.extend(zip(seq.blocks, seq.host))
        self.drop_blocks(seq)
        return True

    def swap_in(self, seq: CachedSequence) -> None:
        """Bring back from the host what `adopt` did not find in the tree; takes blocks as `need` says."""
        count = self.blocks_for(seq.host_tokens)
        for i in range(len(seq.blocks), count):
            block = self._allocate()
            self._moves.swap_in.append((seq.host[i], block))
            seq.blocks.append(block)
            self.held_blocks += 1
        self.filled_slots += max(0, seq.host_tokens - seq.num_tokens)
        seq.num_tokens = max(seq.num_tokens, seq.host_tokens)
        self._slots_leaving += seq.host  # still read by this step's swap_in, which runs after its swap_out
        seq.host = []
        seq.host_tokens = 0

    def end_step(self) -> BlockMoves:
        """This step's block moves; copy sources are unpinned and swapped-in slots freed."""
        moves = self._moves
        if self._pins or self._slots_leaving:
            for block, node in self._pins:
                self.pool.decref(block)
                if node is not None:
                    self.tree.unlock(node)
            for slot in self._slots_leaving:
                self.host.decref(slot)
            self._pins, self._pinned, self._slots_leaving = [], {}, []
        self._moves = BlockMoves()
        return moves

    def reset(self) -> int:
        """Evict every prefix that no running sequence holds; returns the number of blocks freed."""
        return self.tree.evict(self.tree.num_evictable)

    def _allocate(self) -> int:
        while self.pool.num_free == 0:
            if not self.tree.evict(1):
                raise OutOfBlocksError(f"all {self.pool.num_usable} blocks are held by requests")
        return self.pool.allocate()

    def _shared(self, block: int) -> bool:
        """Whether another sequence or the tree owns `block`. Pins do not count: copies run before writes."""
        return self.pool.refs[block] - self._pinned.get(block, 0) > 1

    def _own(self, seq: CachedSequence, index: int) -> None:
        """Make block `index`, which is about to be written, private: copy-on-write when it is shared."""
        source = seq.blocks[index]
        if self._shared(source):
            pin = seq.node if seq.depth > index else None
            if pin is not None:  # keep the node locked too, or eviction would count on a pinned block
                self.tree.lock(pin)
            self._pins.append((source, pin))  # the sequence's own count becomes the pin's
            self._pinned[source] = self._pinned.get(source, 0) + 1
            seq.blocks[index] = self._allocate()
            self._moves.copies.append((source, seq.blocks[index]))
        self._unlock_to(seq, index)

    def _unlock_to(self, seq: CachedSequence, depth: int) -> None:
        while seq.depth > depth:
            assert seq.node is not None
            seq.node = self.tree.unlock_tail(seq.node)
            seq.depth -= 1

    def check_integrity(self, sequences: Sequence[CachedSequence]) -> None:
        """Raise AssertionError unless `sequences`, tree and pins explain every block count and lock."""
        self.pool.check_integrity()
        self.host.check_integrity()
        self.tree.check_integrity()
        owners = [0] * self.pool.num_blocks
        slots = [0] * self.host.num_blocks
        locks: dict[int, int] = {}
        of_block = {node.block: node for node in self.tree.nodes()}
        for node in of_block.values():
            owners[node.block] += 1
        for block, pin in self._pins:
            owners[block] += 1
            _count_path(pin, locks)
        for slot in self._slots_leaving:
            slots[slot] += 1
        for seq in sequences:
            assert self.blocks_for(seq.num_tokens) <= len(seq.blocks), "tokens without a block"
            assert seq.depth <= len(seq.blocks), "locked past the end"
            path = _count_path(seq.node, locks)
            assert len(path) == seq.depth, "depth is not the locked path's length"
            for i, block in enumerate(seq.blocks):
                owners[block] += 1
                assert block not in of_block or (i < seq.depth and path[i] is of_block[block]), "held, not locked"
            for slot in seq.host:
                slots[slot] += 1
        assert owners == self.pool.refs, "block counts drifted"
        assert slots == self.host.refs, "host slot counts drifted"
        for node in of_block.values():
            assert node.locks == locks.get(id(node), 0), f"block {node.block}: locks drifted"
        assert self.held_blocks == sum(len(seq.blocks) for seq in sequences), "held_blocks drifted"
        assert self.filled_slots == sum(seq.num_tokens for seq in sequences), "filled_slots drifted"


def _count_path(node: RadixNode | None, locks: dict[int, int]) -> list[RadixNode]:
    """Add one lock for every node from `node` to its root; returns the path without the root, in order."""
    path: list[RadixNode] = []
    while node is not None:
        locks[id(node)] = locks.get(id(node), 0) + 1
        if node.parent is not None:
            path.append(node)
        node = node.parent
    return path[::-1]
