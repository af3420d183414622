"""A context cut into ranges: partials of each, folded, are the bits of attention over the whole."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.load import load_ops
from headrace.kernels.ops import AttentionMeta, Ops
from headrace.kernels.partials import SPLIT, Partials, nodes_of
from headrace.kernels.training import TrainingOps
from kernels.attention_kit import LAYER, Parts, float64, packed, sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=["cpu", "reference"])
def ops(request) -> TrainingOps:
    return load_ops(request.param)


def ranges_of(meta: AttentionMeta, cuts: list[int]) -> list[torch.Tensor]:
    """Each owner's positions of every sequence, cut after these numbers of splits."""
    context_S1 = meta.context_len_S[:, None]
    bounds = [0, *(cut * SPLIT for cut in cuts), 1 << 20]
    return [
        torch.tensor([pair]).minimum((context_S1 + SPLIT - 1) // SPLIT * SPLIT) for pair in itertools.pairwise(bounds)
    ]


def owned(blocks: torch.Tensor, meta: AttentionMeta, range_S2: torch.Tensor) -> tuple[torch.Tensor, AttentionMeta]:
    """A cache with the range's positions alone, NaN elsewhere, and a table that lacks blocks without any of them."""
    size, table_SM, own = blocks.shape[4], meta.block_table_SM.clone(), torch.full_like(blocks, torch.nan)
    for s, (first, last) in enumerate(range_S2.tolist()):
        for i, block in enumerate(meta.block_table_SM[s].tolist()):
            a, b = max(0, first - i * size), min(size, last - i * size)
            if a < b:
                own[block, :, :, :, a:b] = blocks[block, :, :, :, a:b]
            else:
                table_SM[s, i] = 0
    meta = AttentionMeta(table_SM, meta.query_start_S1, meta.context_len_S, meta.slots_T, 0, 0)
    return own, meta


def partials(ops: Ops, parts: Parts, cuts: list[int], block_size: int, window: int) -> tuple[list[Partials], list]:
    """Each owner's partials, and its ranges."""
    q, blocks, meta = packed(parts, block_size, window)
    ranges = ranges_of(meta, cuts)
    found = []
    for range_S2 in ranges:
        own, own_meta = owned(blocks, meta, range_S2)
        found.append(ops.attention_partials(q, own, LAYER, own_meta, q.shape[2] ** -0.5, range_S2, window))
    return found, ranges


def whole_and_folded(
    ops: Ops, parts: Parts, cuts: list[int], block_size: int, window: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(out, log-sum-exp) of attention, and of owners' partials folded."""
    q, blocks, meta = packed(parts, block_size, window)
    lse, folded_lse = torch.empty(q.shape[:2]), torch.empty(q.shape[:2])
    whole = ops.attention(q, blocks, LAYER, meta, q.shape[2] ** -0.5, window, lse)
    found, ranges = partials(ops, parts, cuts, block_size, window)
    return (whole, lse), (ops.fold_partials(found, ranges, meta, window, folded_lse), folded_lse)


@st.composite
def cases(draw, most_splits):
    kv_heads, group, dim = draw(st.sampled_from([(1, 1, 16), (2, 1, 20), (1, 3, 36), (2, 4, 8), (1, 9, 16)]))
    dtype = draw(st.sampled_from(DTYPES))
    parts = []
    for seed in range(draw(st.integers(1, 3))):
        last = draw(
            st.one_of(st.integers(1, most_splits * SPLIT), st.integers(1, most_splits).map(lambda n: n * SPLIT))
        )
        rows = min(last, draw(st.sampled_from([0, 1, 1, 2, 17, 300])))
        parts.append((sequence(seed, last, kv_heads, group, dim, dtype), last - rows, last))
    cuts = sorted(draw(st.lists(st.integers(0, most_splits), max_size=3)))
    window = draw(st.one_of(st.just(0), st.integers(1, most_splits * SPLIT)))
    return parts, cuts, draw(st.sampled_from([8, 16, 64, 256])), window


@given(cases(most_splits=9))
@settings(deadline=None, max_examples=60)
def test_every_cut_has_the_bits_of_attention_on_the_cpu(case):
    whole, folded = whole_and_folded(load_ops("cpu"), *case)
    assert torch.equal(whole[0], folded[0]) and torch.equal(whole[1], folded[1])


@given(cases(most_splits=4))
@settings(deadline=None, max_examples=15)
def test_every_cut_has_the_bits_of_attention_in_torch(case):
    whole, folded = whole_and_folded(load_ops("reference"), *case)
    assert torch.equal(whole[0], folded[0]) and torch.equal(whole[1], folded[1])


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("cuts", [[1], [4], [3, 5], [2, 4, 6], list(range(1, 7))], ids=str)
def test_two_three_and_more_owners(ops, cuts, window):
    parts = [(sequence(3, 6 * SPLIT + 90, 2, 3, 20), 4 * SPLIT - 3, 6 * SPLIT + 90)]
    whole, folded = whole_and_folded(ops, parts, cuts, 16, window)
    assert torch.equal(whole[0], folded[0]) and torch.equal(whole[1], folded[1])


@pytest.mark.parametrize("window", [0, 1, 300])
def test_the_merge_formula_over_all_partials_is_softmax(ops, window):
    """Infinite-LLM, equation 2: out = Σ e^{m_j − m} MA_j / Σ e^{m_j − m} e_j, in any order."""
    seq, first, last = sequence(5, 1300, 1, 2, 16), 1290, 1300
    found, _ = partials(ops, [(seq, first, last)], [1, 3], 16, window)
    ma, m, e = (torch.cat(x, 2).double() for x in zip(*found))
    scale = torch.exp(m - m.amax(2, keepdim=True))
    merged = (scale[..., None] * ma).sum(2) / (scale * e).sum(2)[..., None]
    torch.testing.assert_close(merged, float64(seq, first, last, window), rtol=0, atol=1.5e-5)


def test_a_long_aligned_range_is_a_handful_of_partials(ops):
    seq = sequence(6, 8 * SPLIT + 1, 1, 1, 8)
    found, _ = partials(ops, [(seq, 8 * SPLIT, 8 * SPLIT + 1)], [4, 6], 256, 0)
    assert [part.m_THL.shape[2] for part in found] == [1, 1, 2]
    assert len(list(nodes_of(2000 * SPLIT, 0, 3, 1999))) <= 2 * 11


def test_rows_with_fewer_nodes_end_with_nothing(ops):
    """Of two sequences one has nothing in the range, and of a chunk over a split's end the first rows have less."""
    long, short = sequence(7, 2 * SPLIT + 2, 1, 1, 8), sequence(8, 3, 1, 1, 8)
    found, _ = partials(ops, [(long, 2 * SPLIT - 2, 2 * SPLIT + 2), (short, 0, 3)], [1], 16, 0)
    far = found[1]
    assert torch.equal(far.e_THL[:, 0] > 0, torch.tensor([[1, 0]] * 2 + [[1, 1]] * 2 + [[0, 0]] * 3).bool())
    assert torch.equal(far.m_THL == -torch.inf, far.e_THL == 0)
    assert not far.MA_THLd[far.e_THL == 0].any()


def test_a_cut_elsewhere_and_a_range_left_out_are_refused(ops):
    q, blocks, meta = packed([(sequence(9, 700, 1, 1, 8), 690, 700)])
    for pair in ([100, 700], [0, 300], [512, 256], [-256, 256]):
        with pytest.raises(ValueError, match="cut at multiples of 256"):
            ops.attention_partials(q, blocks, LAYER, meta, 1.0, torch.tensor([pair]))
    pairs = [[0, 256], [256, 512], [512, 700]]
    parts = [ops.attention_partials(q, blocks, LAYER, meta, 1.0, torch.tensor([pair])) for pair in pairs]
    for order in ([0, 1], [0, 2], [1, 2], [1, 0, 2]):
        with pytest.raises(ValueError, match="in order"):
            ops.fold_partials([parts[i] for i in order], [torch.tensor([pairs[i]]) for i in order], meta)
    # With a window the first split is not seen, and may be left out.
    windowed = [ops.attention_partials(q, blocks, LAYER, meta, 1.0, torch.tensor([pair]), 300) for pair in pairs[1:]]
    folded = ops.fold_partials(windowed, [torch.tensor([pair]) for pair in pairs[1:]], meta, 300)
    assert torch.equal(folded, ops.attention(q, blocks, LAYER, meta, 1.0, 300))


def test_partials_added_in_another_order_have_other_bits():
    """A mutant: nodes merged one after the other, whatever the tree."""
    ops = load_ops("cpu")
    parts = [(sequence(10, 6 * SPLIT, 1, 2, 16), 6 * SPLIT - 1, 6 * SPLIT)]
    (whole, _), _ = whole_and_folded(ops, parts, [1, 2, 3, 4, 5], 16, 0)
    found, _ = partials(ops, parts, [1, 2, 3, 4, 5], 16, 0)
    ma, m, e = (torch.cat(x, 2) for x in zip(*found))
    out, best, total = ma[:, :, 0], m[:, :, 0], e[:, :, 0]
    for i in range(1, 6):
        new = torch.maximum(best, m[:, :, i])
        left, right = torch.exp(best - new), torch.exp(m[:, :, i] - new)
        out = out * left[..., None] + ma[:, :, i] * right[..., None]
        best, total = new, total * left + e[:, :, i] * right
    torch.testing.assert_close(out / total[..., None], whole, rtol=0, atol=1e-5)
    assert not torch.equal(out / total[..., None], whole)
