import pytest

from headrace.cache.blocks import BlockPool, OutOfBlocksError
from headrace.errors import ConfigError


def test_null_block_is_never_handed_out_and_all_others_are():
    pool = BlockPool(5)
    assert sorted(pool.allocate() for _ in range(4)) == [1, 2, 3, 4]
    with pytest.raises(OutOfBlocksError, match="all 4 blocks"):
        pool.allocate()
    pool.check_integrity()


def test_a_block_is_free_when_its_last_owner_goes():
    pool = BlockPool(3)
    block = pool.allocate()
    pool.incref(block)
    assert not pool.decref(block) and pool.num_owned == 1
    assert pool.decref(block) and pool.num_free == 2
    assert pool.allocate() == block  # the last freed is the first reused
    pool.check_integrity()


def test_misuse_is_refused():
    pool = BlockPool(3)
    with pytest.raises(ValueError, match="free"):
        pool.incref(1)
    with pytest.raises(ValueError, match="already free"):
        pool.decref(2)
    with pytest.raises(ConfigError, match="leaves no KV block"):
        BlockPool(1)


def test_a_host_pool_has_no_null_slot_and_may_be_empty():
    assert BlockPool(0, first=0).num_free == 0
    pool = BlockPool(2, first=0)
    assert {pool.allocate(), pool.allocate()} == {0, 1}


def test_integrity_check_sees_a_lost_block():
    pool = BlockPool(4)
    pool.refs[pool.allocate()] = 0
    with pytest.raises(AssertionError):
        pool.check_integrity()
