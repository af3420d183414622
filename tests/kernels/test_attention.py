"""Paged attention on the CPU: close to float64 on every shape, and one bit pattern per row whatever surrounds it."""

import numba
import numpy as np
import pytest
import torch

from headrace.kernels.cpu.memory import load8, pointer
from headrace.kernels.cpu.partial import NODES, ROWS, Paged, partial, room_for
from headrace.kernels.cpu.simd import fma1, hsum8
from headrace.kernels.cpu.tiles import score_tile
from headrace.kernels.cpu.tree import merge
from headrace.kernels.load import load_ops
from headrace.kernels.ops import Ops
from headrace.kernels.partials import SPLIT
from kernels.attention_kit import Sequence, attend, float64, sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def ops() -> Ops:
    return load_ops("cpu", threads=2)


SHAPES = [  # kv heads, group, dim, block size, window, (first, last) of each sequence
    (2, 1, 8, 8, 0, [(0, 20), (255, 258), (300, 301)]),
    (2, 2, 16, 16, 0, [(0, 1), (511, 513), (40, 61), (699, 700)]),
    (1, 3, 20, 8, 0, [(17, 48), (511, 512), (700, 701)]),
    (4, 3, 64, 16, 0, [(0, 33), (254, 262), (600, 601)]),
    (2, 4, 128, 32, 0, [(250, 260), (0, 5), (699, 700)]),
    (1, 8, 80, 16, 0, [(120, 140), (513, 514)]),
    (1, 5, 24, 256, 0, [(500, 520), (3, 4)]),
    (1, 40, 16, 16, 0, [(300, 303)]),
    (2, 3, 36, 1, 0, [(0, 12), (256, 257)]),
    (2, 2, 16, 8, 1, [(0, 20), (255, 258)]),
    (2, 1, 20, 16, 3, [(0, 40), (510, 516), (700, 701)]),
    (1, 3, 64, 16, 100, [(90, 110), (300, 330), (699, 700)]),
    (2, 4, 32, 32, 256, [(250, 262), (511, 513), (768, 769)]),
    (1, 1, 16, 8, 300, [(0, 3), (290, 310), (560, 700)]),
]


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_close_to_float64_on_any_shape(ops, index):
    kv_heads, group, dim, block_size, window, spans = SHAPES[index]
    for dtype in {torch.float32, DTYPES[index % 3]}:
        seqs = [sequence(i, last, kv_heads, group, dim, dtype) for i, (_, last) in enumerate(spans)]
        parts = [(seq, first, last) for seq, (first, last) in zip(seqs, spans)]
        got = attend(ops, parts, block_size, window)
        for part, rows in zip(parts, got):
            torch.testing.assert_close(rows.double(), float64(*part, window=window), rtol=0, atol=1.5e-5)


@pytest.fixture(scope="module", params=[0, 37, 290], ids=lambda w: f"window{w}")
def whole(request, ops):
    """A sequence over three splits, its window, and its rows from one whole prefill."""
    seq = sequence(7, 601, 2, 3, 20, DTYPES[1 if request.param == 37 else 0])
    return seq, request.param, attend(ops, [(seq, 0, 601)], window=request.param)[0]


@pytest.mark.parametrize("chunk", [1, 7, 64, 256])
def test_chunking_changes_no_bit(ops, whole, chunk):
    seq, window, expected = whole
    starts = [*range(0, 40, chunk), *range(240, 280, chunk), *range(600 - chunk, 601 - chunk)]
    for start in starts:
        (rows,) = attend(ops, [(seq, start, start + chunk)], window=window)
        assert torch.equal(rows, expected[start : start + chunk]), f"rows from {start}"


@pytest.mark.parametrize("block_size", [1, 8, 32, 256])
def test_block_size_changes_no_bit(ops, whole, block_size):
    seq, window, expected = whole
    assert torch.equal(attend(ops, [(seq, 0, 601)], block_size, window)[0], expected)


def test_neighbours_and_threads_change_no_bit(whole):
    seq, window, expected = whole
    others = [sequence(100 + i, 90 * i + 5, 2, 3, 20, seq.k.dtype) for i in range(6)]
    parts = [(other, 90 * i, 90 * i + 5) for i, other in enumerate(others)]
    batch = [*parts[:3], (seq, 255, 300), *parts[3:], (seq, 600, 601)]
    for threads in (1, 2):
        got = attend(load_ops("cpu", threads=threads), batch, window=window)
        assert torch.equal(got[3], expected[255:300])
        assert torch.equal(got[-1], expected[600:])


def test_a_group_is_its_heads_alone(ops):
    """A head in a group of four is tiled, a head on its own is not: the same bits."""
    seq = sequence(3, 530, 1, 4, 64)
    (together,) = attend(ops, [(seq, 529, 530)])
    for head in range(4):
        (alone,) = attend(ops, [(Sequence(seq.q[:, head : head + 1], seq.k, seq.v), 529, 530)])
        assert torch.equal(alone[:, 0], together[:, head])


def test_what_comes_later_does_not_leak(ops):
    """Later tokens of the same chunk, NaN and infinite ones too, leave no trace."""
    seq = sequence(4, 300, 2, 2, 16)
    (clean,) = attend(ops, [(seq, 0, 300)])
    for bad in (torch.nan, torch.inf):
        for cut in (1, 2, 3, 255, 257):
            spoilt = Sequence(seq.q, seq.k.clone(), seq.v.clone())
            spoilt.k[cut:], spoilt.v[cut:] = bad, bad
            (rows,) = attend(ops, [(spoilt, 0, 300)])
            assert torch.equal(rows[:cut], clean[:cut])


@pytest.mark.parametrize("window", [5, 64, 300])
def test_blocks_behind_the_window_may_be_gone(ops, window):
    seq = sequence(5, 700, 2, 2, 16)
    for first, last in ((699, 700), (400, 420), (255, 258)):
        kept = attend(ops, [(seq, first, last)], window=window)[0]
        assert torch.equal(attend(ops, [(seq, first, last)], window=window, forget=True)[0], kept)


def test_a_window_as_long_as_the_sequence_is_no_window(ops):
    seq = sequence(6, 400, 1, 2, 16)
    assert torch.equal(attend(ops, [(seq, 0, 400)], window=400)[0], attend(ops, [(seq, 0, 400)])[0])


def test_nothing_to_do(ops):
    seq = sequence(8, 20, 2, 2, 16)
    empty, rows = attend(ops, [(seq, 10, 10), (seq, 10, 20)])
    assert empty.shape == (0, 4, 16)
    assert torch.equal(rows, attend(ops, [(seq, 10, 20)])[0])
    assert attend(ops, [(seq, 0, 0)])[0].shape == (0, 4, 16)


# ---- the law itself: the tree, written again in Python over the kernel's own partials --------------------------


def nodes_of(seq: Sequence, splits: int) -> tuple[np.ndarray, int]:
    """The partials of the last row's every split: [split, node]."""
    position, dim = splits * SPLIT - 1, seq.q.shape[2]
    blocks = torch.stack((seq.k, seq.v)).transpose(1, 2).unflatten(2, (-1, SPLIT)).permute(2, 0, 1, 3, 4).contiguous()
    table, query = np.arange(splits + 1, dtype=np.int32), seq.q.numpy()[position].reshape(-1)
    found = [partial_of(query, position, blocks.numpy().reshape(-1), table, split, dim) for split in range(splits)]
    return np.stack(found), dim + 8


@numba.njit(nogil=True, error_model="numpy")
def partial_of(query, position, blocks, table, split, dim):
    """The node of one row."""
    array = np.zeros(room_for(pointer(query), 1, dim)[1], np.float32)
    return node_in(array, query, position, blocks, table, split, dim)


@numba.njit(nogil=True, error_model="numpy")
def node_in(array, query, position, blocks, table, split, dim):
    room = room_for(pointer(array), 1, dim)[0]
    for c in range(dim):
        array[room.queries + c * ROWS] = query[c]
    paged = Paged(pointer(blocks), table, 2 * SPLIT * dim, 0, SPLIT * dim, 8, dim, position + 1)
    partial(room.queries, np.full(ROWS, position), 1, paged, split, 0, 0, np.float32(dim**-0.5), room)
    return array[NODES : NODES + room.node].copy()


@numba.njit(nogil=True, error_model="numpy")
def scores_of(x, w, count, out, rows):
    """Scores of packed rows and a panel of keys by the tile, then as one eight-lane dot product each."""
    p, kv, to = pointer(x), pointer(w), pointer(out)
    if rows == 1:
        score_tile(1, p, 0, 16, kv, 0, count, to, 0, 16, kv, 0)
    elif rows == 3:
        score_tile(3, p, 0, 16, kv, 0, count, to, 0, 16, kv, 0)
    else:
        score_tile(6, p, 0, 16, kv, 0, count, to, 0, 16, kv, 0)
    lanes = np.zeros(8, np.float32)
    for r in range(rows):
        for n in range(16):
            lanes[:] = 0
            for k in range(count):
                lanes[k % 8] = fma1(x[16 * k + r], w[16 * k + n], lanes[k % 8])
            out[16 * (rows + r) + n] = hsum8(load8(pointer(lanes), 0))


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 20, 64, 100])
def test_a_score_is_eight_lanes_of_fused_sums(rows, count):
    x, w = np.random.default_rng(count).standard_normal((2, 16 * count)).astype(np.float32)
    out = np.zeros((2, rows, 16), np.float32)
    scores_of(x, w, count, out.reshape(-1), rows)
    assert np.array_equal(out[0].view(np.int32), out[1].view(np.int32))


def join(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    both = np.concatenate((left, right))
    merge(both, 0, len(left), len(left))
    return both[len(left) :]


def by_law(nodes: list[np.ndarray]) -> np.ndarray:
    """Maximal power-of-two nodes, each a balanced tree, then left to right."""

    def balanced(part: list[np.ndarray]) -> np.ndarray:
        half = len(part) // 2
        return join(balanced(part[:half]), balanced(part[half:])) if half else part[0]

    total: np.ndarray | None = None
    start = 0
    while start < len(nodes):
        size = 1 << ((len(nodes) - start).bit_length() - 1)
        tree = balanced(nodes[start : start + size])
        total = tree if total is None else join(total, tree)
        start += size
    assert total is not None
    return total


def in_a_row(nodes: list[np.ndarray]) -> np.ndarray:
    """A mutant: merged one after the other, as a running softmax would."""
    total = nodes[0]
    for node in nodes[1:]:
        total = join(total, node)
    return total


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 6, 7])
def test_partials_are_merged_in_the_tree_and_another_order_has_other_bits(ops, splits):
    seq = sequence(splits, splits * SPLIT, 1, 1, 16)
    (row,) = attend(ops, [(seq, splits * SPLIT - 1, splits * SPLIT)])
    nodes, node = nodes_of(seq, splits)
    tree = by_law(list(nodes))
    assert np.array_equal(tree[:16] / tree[node - 1], row.numpy().reshape(-1))
    if splits >= 5:
        mutant = in_a_row(list(nodes))
        assert not np.array_equal(mutant[:16] / mutant[node - 1], row.numpy().reshape(-1))


def test_a_split_elsewhere_has_other_bits(ops):
    """A mutant: splits that start at the second token. Were alignment ignored, no test above could tell."""
    seq = sequence(11, 514, 1, 1, 16)
    (row,) = attend(ops, [(seq, 513, 514)])
    spare = Sequence(torch.cat((seq.q[:1], seq.q)), torch.cat((seq.k[:1], seq.k)), torch.cat((seq.v[:1], seq.v)))
    (shifted,) = attend(ops, [(spare, 514, 515)], window=514)
    torch.testing.assert_close(shifted, row, rtol=0, atol=1.5e-5)
    assert not torch.equal(shifted, row)
