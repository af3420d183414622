import pytest

from headrace.cache.blocks import BlockPool
from headrace.cache.key import CacheKey
from headrace.cache.radix import RadixTree


def insert(tree, tokens, cache_key=CacheKey()):
    """Insert whole blocks of `tokens` as a request that then ends; returns their blocks."""
    node = tree.root(cache_key)
    tree.lock(node)
    blocks = []
    for i in range(0, len(tokens) - tree.block_size + 1, tree.block_size):
        block = tree.pool.allocate()
        node = tree.extend(node, tuple(tokens[i : i + tree.block_size]), block)
        tree.pool.decref(block)
        blocks.append(node.block)
    tree.unlock(node)
    tree.check_integrity()
    return blocks


@pytest.fixture
def tree():
    return RadixTree(BlockPool(64), 2)


def blocks_of(tree, tokens, cache_key=CacheKey(), limit=99):
    return [node.block for node in tree.match(tokens, cache_key, limit)]


def test_match_gives_the_longest_prefix_of_whole_blocks(tree):
    blocks = insert(tree, [1, 2, 3, 4, 5, 6])
    assert blocks_of(tree, [1, 2, 3, 4, 5, 6, 7]) == blocks
    assert blocks_of(tree, [1, 2, 3, 9]) == blocks[:1]
    assert blocks_of(tree, [1, 2, 3, 4, 5, 6], limit=5) == blocks[:2]
    assert blocks_of(tree, [2, 1]) == [] == blocks_of(tree, [1])


def test_the_first_block_for_a_prefix_stays(tree):
    first = insert(tree, [1, 2, 3, 4])
    free = tree.pool.num_free
    assert insert(tree, [1, 2, 3, 4]) == first
    assert tree.pool.num_free == free


def test_cache_keys_share_nothing_and_empty_ones_vanish(tree):
    one, two = insert(tree, [1, 2], CacheKey(salt="a")), insert(tree, [1, 2], CacheKey(salt="b"))
    assert one != two and blocks_of(tree, [1, 2]) == []
    assert tree.evict(9) == 2
    assert blocks_of(tree, [1, 2], CacheKey(salt="a")) == [] and not tree._roots
    tree.check_integrity()


def test_eviction_takes_leaves_least_recently_used_first(tree):
    old = insert(tree, [1, 2, 3, 4])
    new = insert(tree, [1, 2, 5, 6])
    path = tree.match([1, 2, 3, 4], CacheKey(), 99)
    tree.lock(path[-1])
    tree.unlock(path[-1])  # [3, 4] is now the last used
    assert tree.evict(1) == 1
    assert blocks_of(tree, [1, 2, 5, 6]) == new[:1] and blocks_of(tree, [1, 2, 3, 4]) == old
    assert tree.evict(1) == 1 and blocks_of(tree, [1, 2]) == old[:1]
    assert tree.evict(5) == 1 and tree.num_nodes == 0 and tree.pool.num_owned == 0


def test_locked_paths_stay(tree):
    insert(tree, [1, 2, 3, 4, 5, 6])
    path = tree.match([1, 2, 3, 4], CacheKey(), 4)
    tree.lock(path[-1])
    assert tree.num_evictable == 1 and tree.evict(9) == 1
    assert len(tree.match([1, 2, 3, 4, 5, 6], CacheKey(), 99)) == 2
    tree.unlock(path[-1])
    assert tree.evict(9) == 2


def test_the_heap_of_candidates_stays_small(tree):
    insert(tree, [1, 2, 3, 4])
    leaf = tree.match([1, 2, 3, 4], CacheKey(), 4)[-1]
    for _ in range(5000):
        tree.lock(leaf)
        tree.unlock(leaf)
    assert len(tree._heap) < 1000
    tree.check_integrity()
    assert tree.evict(2) == 2
