"""The manager against a simple model of what each slot holds after its block moves."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.cache.key import CacheKey
from headrace.cache.manager import CachedSequence, CacheManager


def grown(manager, tokens, end=None):
    seq = CachedSequence(CacheKey())
    manager.adopt(seq, manager.match(tokens, CacheKey(), len(tokens) - 1))
    manager.grow(seq, len(tokens) if end is None else end)
    manager.commit(seq, tokens, len(tokens))
    return seq


def test_a_prefix_is_shared_in_the_step_that_computes_it():
    manager = CacheManager(20, 4)
    tokens = list(range(12))
    first = grown(manager, tokens)
    second = grown(manager, [*tokens, 99])
    assert second.blocks[:3] == first.blocks[:3] and len(second.blocks) == 4
    manager.check_integrity([first, second])


def test_fork_copies_the_partial_block_once_and_only_when_written():
    manager = CacheManager(20, 4)
    parent = grown(manager, list(range(6)))
    manager.end_step()
    child = CachedSequence(CacheKey())
    manager.fork(parent, child, 6)
    assert child.blocks == parent.blocks and manager.end_step().copies == []
    shared = parent.blocks[1]
    assert manager.need(parent, 7) == manager.need(child, 7) == 1
    manager.grow(child, 7)
    manager.grow(parent, 7)  # the only owner now: writes in place although the source is still pinned
    assert manager.end_step().copies == [(shared, child.blocks[1])]
    assert parent.blocks[1] == shared and parent.blocks[0] == child.blocks[0]
    manager.check_integrity([parent, child])


def test_a_copy_source_is_pinned_until_the_end_of_the_step():
    manager = CacheManager(4, 4)
    parent = grown(manager, list(range(6)))
    child = CachedSequence(CacheKey())
    manager.fork(parent, child, 6)
    source = parent.blocks[1]
    manager.grow(child, 7)
    manager.release(parent)
    assert manager.available == 0 and manager.pool.refs[source] == 1
    assert manager.end_step().copies == [(source, child.blocks[1])]
    assert manager.pool.refs[source] == 0
    manager.check_integrity([child])


def test_a_block_in_the_tree_is_copied_before_a_rewound_sequence_writes_it():
    manager = CacheManager(20, 4)
    seq = grown(manager, list(range(8)))
    manager.rewind(seq, 6)
    cached = seq.blocks[1]
    manager.grow(seq, 7)
    assert manager.end_step().copies == [(cached, seq.blocks[1])]
    assert len(manager.match(list(range(9)), CacheKey(), 9)) == 2  # the cached prefix is whole
    manager.check_integrity([seq])


def test_a_rewound_sequence_leaves_the_path_it_was_on():
    manager = CacheManager(20, 4)
    old, new = list(range(8)), [0, 1, 2, 3, 4, 9, 9, 9, 5, 5, 5, 5]
    seq = grown(manager, old)
    manager.rewind(seq, 5)
    manager.grow(seq, 12)
    manager.commit(seq, new, 12)
    assert [n.block for n in manager.match([*new, 1], CacheKey(), 12)] == seq.blocks
    assert len(manager.match([*old, 5, 5, 5, 5], CacheKey(), 12)) == 2
    manager.check_integrity([seq])


def test_what_is_pinned_is_not_available():
    manager = CacheManager(5, 4)
    parent = grown(manager, list(range(8)))
    child = CachedSequence(CacheKey())
    manager.fork(parent, child, 6)
    manager.release(parent)
    manager.grow(child, 7)
    assert manager.available == 1 and manager.reset() == 0
    manager.end_step()
    assert manager.available == 2 and manager.reset() == 1
    manager.check_integrity([child])


def test_a_released_table_keeps_what_a_plan_may_refer_to():
    manager = CacheManager(5, 4)
    seq = grown(manager, list(range(8)))
    shown = seq.blocks
    manager.release(seq)
    assert len(shown) == 2 and seq.blocks == [] and seq.segments[0].blocks is seq.blocks


def test_duplicates_keep_their_own_block_and_the_tree_the_first():
    manager = CacheManager(20, 4)
    tokens = list(range(9))
    first = grown(manager, tokens)
    second = CachedSequence(CacheKey())
    manager.adopt(second, [])  # as prompt log-probabilities ask: from position 0
    manager.grow(second, 9)
    manager.commit(second, tokens, 9)
    assert not set(first.blocks) & set(second.blocks)
    assert [n.block for n in manager.match(tokens, CacheKey(), 8)] == first.blocks[:2]
    manager.check_integrity([first, second])


def test_swap_moves_every_block_and_brings_back_what_the_tree_lost():
    manager = CacheManager(6, 4, host_slots=4)
    tokens = list(range(10))
    seq = grown(manager, tokens)
    manager.end_step()
    old = list(seq.blocks)
    assert manager.swap_out(seq) and manager.available == 5
    assert manager.end_step().swap_out == list(zip(old, [0, 1, 2])) and manager.host.num_free == 1
    manager.tree.evict(1)  # block 1 of 2 that were cached
    manager.adopt(seq, manager.match(tokens, CacheKey(), 9))
    assert seq.num_tokens == 4 and manager.need(seq, 10) == 2
    manager.swap_in(seq)
    assert seq.num_tokens == 10 and manager.host.num_free == 1  # slots are read in this step
    assert [slot for slot, _ in manager.end_step().swap_in] == [1, 2] and manager.host.num_free == 4
    manager.check_integrity([seq])


def test_too_few_host_slots_swap_nothing():
    manager = CacheManager(6, 4, host_slots=1)
    seq = grown(manager, list(range(10)))
    assert not manager.swap_out(seq) and len(seq.blocks) == 3 and manager.host.num_free == 1


def test_without_prefix_caching_nothing_is_kept():
    manager = CacheManager(6, 4, prefix_caching=False)
    seq = grown(manager, list(range(10)))
    manager.release(seq)
    assert manager.pool.num_free == 5 and manager.match(list(range(10)), CacheKey(), 9) == []
    manager.check_integrity([])


def test_reserved_and_filled_slots_are_counted():
    manager = CacheManager(20, 4)
    seq = CachedSequence(CacheKey())
    manager.adopt(seq, [])
    manager.grow(seq, 5, reserve=30)
    assert (manager.held_blocks, manager.filled_slots) == (8, 5)
    manager.grow(seq, 9, reserve=30)
    assert (manager.held_blocks, manager.filled_slots) == (8, 9)
    manager.release(seq)
    assert (manager.held_blocks, manager.filled_slots) == (0, 0)


class Machine(RuleBasedStateMachine):
    """Random sequences of moves, several to a step, with every physical slot simulated.

    A slot holds the prefix that it was computed from. Like the scheduler, the machine never takes blocks from a
    sequence that was seated or granted tokens in the same step.
    """

    @initialize(
        blocks=st.integers(6, 24), slots=st.integers(0, 12), size=st.sampled_from([1, 2, 4]), caching=st.booleans()
    )
    def start(self, blocks, slots, size, caching):
        self.manager = CacheManager(blocks, size, slots, caching)
        self.size = size
        self.device = [[None] * size for _ in range(blocks)]
        self.host = [[None] * size for _ in range(slots)]
        self.tokens = {}  # live sequence → its known tokens
        self.writes = {}  # granted in this step → (start, end)

    def alive(self, granted=None, swapped=False):
        return [
            seq
            for seq in self.tokens
            if bool(seq.host) == swapped and (granted is None or (seq in self.writes) == granted)
        ]

    def write(self, seq, end):
        if self.manager.need(seq, end) > self.manager.available:
            return False
        start = seq.num_tokens
        self.manager.grow(seq, end)
        self.manager.commit(seq, self.tokens[seq], len(self.tokens[seq]))
        self.writes[seq] = (start, end)
        return True

    @rule(stem=st.lists(st.integers(0, 1), min_size=1, max_size=12), more=st.integers(1, 6))
    def admit(self, stem, more):
        seq = CachedSequence(CacheKey())
        self.manager.adopt(seq, self.manager.match(stem, CacheKey(), len(stem) - 1))
        self.tokens[seq] = stem
        if not self.write(seq, min(len(stem), seq.num_tokens + more)):
            self.manager.release(seq)
            del self.tokens[seq]

    @precondition(lambda self: self.alive(granted=False))
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=5))
    def append(self, data, more):
        seq = data.draw(st.sampled_from(self.alive(granted=False)))
        if len(self.tokens[seq]) == seq.num_tokens:
            self.tokens[seq] = [*self.tokens[seq], *more]
        if len(self.tokens[seq]) > seq.num_tokens:
            self.write(seq, data.draw(st.integers(seq.num_tokens + 1, len(self.tokens[seq]))))

    @precondition(lambda self: self.alive())
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def fork(self, data, more):
        parent = data.draw(st.sampled_from(self.alive()))
        busy = {seq.blocks[at // self.size] for seq, span in self.writes.items() for at in range(*span)}
        count = data.draw(st.integers(0, parent.num_tokens))
        if count % self.size and parent.blocks[count // self.size] in busy:
            count -= count % self.size  # a partial block is copied before this step writes it
        child = CachedSequence(CacheKey())
        self.manager.fork(parent, child, count)
        self.tokens[child] = [*self.tokens[parent][:count], *more]
        if not self.write(child, len(self.tokens[child])):
            self.manager.release(child)
            del self.tokens[child]

    @precondition(lambda self: self.alive(granted=False))
    @rule(data=st.data())
    def release(self, data):
        seq = data.draw(st.sampled_from(self.alive(granted=False)))
        self.manager.release(seq)
        del self.tokens[seq]

    @precondition(lambda self: self.alive(granted=False))
    @rule(data=st.data())
    def rewind(self, data):
        seq = data.draw(st.sampled_from(self.alive(granted=False)))
        count = data.draw(st.integers(0, seq.num_tokens))
        self.manager.rewind(seq, count)
        self.tokens[seq] = [*self.tokens[seq][:count], 1 - sum(self.tokens[seq]) % 2]

    @precondition(lambda self: self.alive(granted=False))
    @rule(data=st.data())
    def swap_out(self, data):
        self.manager.swap_out(data.draw(st.sampled_from(self.alive(granted=False))))

    @precondition(lambda self: self.alive(swapped=True))
    @rule(data=st.data(), rewind=st.booleans())
    def swap_in(self, data, rewind):
        seq = data.draw(st.sampled_from(self.alive(swapped=True)))
        if rewind:
            self.manager.rewind(seq, data.draw(st.integers(1, seq.host_tokens)))
        tokens = self.tokens[seq] = self.tokens[seq][: seq.host_tokens]
        self.manager.adopt(seq, self.manager.match(tokens, CacheKey(), len(tokens)))
        if self.manager.need(seq, seq.host_tokens) > self.manager.available:
            self.manager.drop_blocks(seq)
            return
        self.manager.swap_in(seq)
        self.manager.commit(seq, tokens, len(tokens))
        self.writes[seq] = (seq.num_tokens, seq.num_tokens)

    @rule(count=st.integers(1, 3))
    def evict(self, count):
        self.manager.tree.evict(count)

    @rule()
    def end_step(self):
        moves = self.manager.end_step()
        for block, slot in moves.swap_out:
            self.host[slot] = list(self.device[block])
        for slot, block in moves.swap_in:
            self.device[block] = list(self.host[slot])
        for source, target in moves.copies:
            self.device[target] = list(self.device[source])
        for seq, (start, end) in self.writes.items():
            for at in range(start, end):
                self.device[seq.blocks[at // self.size]][at % self.size] = tuple(self.tokens[seq][: at + 1])
        self.writes = {}
        for seq, tokens in self.tokens.items():
            for at in range(seq.num_tokens):
                assert self.device[seq.blocks[at // self.size]][at % self.size] == tuple(tokens[: at + 1])

    @invariant()
    def integrity(self):
        if hasattr(self, "manager"):
            self.manager.check_integrity(list(self.tokens))

    def teardown(self):
        if hasattr(self, "manager"):
            self.end_step()
            for seq in self.tokens:
                self.manager.release(seq)
            self.manager.check_integrity([])
            self.manager.reset()
            assert self.manager.pool.num_owned == self.manager.host.num_owned == 0


TestManager = Machine.TestCase
TestManager.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
