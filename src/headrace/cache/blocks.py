"""`BlockPool`: which KV blocks are free and how many owners each of the others has."""

from __future__ import annotations

from headrace.errors import ConfigError

__all__ = ["BlockPool", "OutOfBlocksError"]


class OutOfBlocksError(RuntimeError):
    """No block is free. Callers must check what is available before they allocate."""


class BlockPool:
    """Reference-counted blocks `first` … `num_blocks - 1` (PagedAttention §4.2).

    Block 0 is the null block that pads block tables, so `first` is 1 for a device pool; a host pool has none.
    A block is free exactly when its count is 0. The last freed block is handed out first: it is warm in the
    caches.
    """

    __slots__ = ("_free", "first", "num_blocks", "refs")

    def __init__(self, num_blocks: int, first: int = 1) -> None:
        if num_blocks < first or (first and num_blocks == first):
            raise ConfigError(f"num_blocks={num_blocks} leaves no KV block: give the cache more memory")
        self.num_blocks = num_blocks
        self.first = first
        self.refs = [0] * num_blocks
        """Owners of each block. Read it; change it through the methods."""
        self._free = list(range(num_blocks - 1, first - 1, -1))

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out at all."""
        return self.num_blocks - self.first

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._free)

    @property
    def num_owned(self) -> int:
        """Blocks with at least one owner."""
        return self.num_usable - len(self._free)

    def allocate(self) -> int:
        """A free block, now with one owner; raises `OutOfBlocksError` when there is none."""
        if not self._free:
            raise OutOfBlocksError(f"all {self.num_usable} blocks are owned")
        block = self._free.pop()
        self.refs[block] = 1
        return block

    def incref(self, block: int) -> None:
        """One more owner of an owned block."""
        if self.refs[block] < 1:
            raise ValueError(f"block {block} is free: it cannot be shared")
        self.refs[block] += 1

    def decref(self, block: int) -> bool:
        """One owner fewer; returns whether the block became free."""
        count = self.refs[block] - 1
        if count < 0:
            raise ValueError(f"block {block} is already free")
        self.refs[block] = count
        if count == 0:
            self._free.append(block)
        return count == 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless the free list is exactly the blocks without owners."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        for block, count in enumerate(self.refs):
            assert count >= 0, f"block {block} has {count} owners"
            if block < self.first:
                assert count == 0 and block not in free, f"reserved block {block} was handed out"
            else:
                assert (count == 0) == (block in free), f"block {block}: {count} owners, free={block in free}"
