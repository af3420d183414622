"""What training adds to the row-wise operations: right gradients, and an element's bits do not depend on its place."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels.cpu import CpuOps
from headrace.kernels.reference import ReferenceOps
from headrace.kernels.shards import vocab_bounds

ONE, REFERENCE = CpuOps(threads=1), ReferenceOps()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
examples = settings(max_examples=25, deadline=None, derandomize=True)
rows_st, width_st = st.integers(1, 300), st.one_of(st.integers(1, 20), st.integers(1, 200))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(function, g: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """fp64 gradients of Σ g · function(inputs) by torch."""
    leaves = [x.double().requires_grad_() for x in inputs]
    return torch.autograd.grad((function(*leaves) * g.double()).sum(), leaves)


def assert_close(got: Tensor, want: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=2e-6 * scale)


def random_cuts(draw, size: int, shards: int) -> tuple[int, ...]:
    inner = draw(st.lists(st.integers(0, size), min_size=shards - 1, max_size=shards - 1))
    return (0, *sorted(inner), size)


# ---- norms -----------------------------------------------------------------------------------------------------


@examples
@given(st.data(), rows_st, width_st, st.sampled_from(DTYPES))
def test_gradients_of_a_norm(cut, data, rows, width, dtype):
    bounds = random_cuts(data.draw, rows, data.draw(st.integers(1, 5)))
    g, x, weight = normal(rows, width), normal(rows, width, seed=1) * 3, normal(width, seed=2).to(dtype)
    g_x, g_weight = ONE.rms_norm_backward(g, x, weight, EPS, bounds)
    assert g_weight.shape == (len(bounds) - 1, width) and g_weight.dtype == torch.float32

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight

    want_x, want_weight = gradients(norm, g, x, weight)
    assert_close(g_x, want_x)
    assert_close(g_weight.sum(0), want_weight, math.sqrt(rows))
    for got, want in zip((g_x, g_weight), REFERENCE.rms_norm_backward(g, x, weight, EPS, bounds), strict=True):
        assert_close(got, want, math.sqrt(rows))
    for got, want in zip((g_x, g_weight), cut.rms_norm_backward(g, x, weight, EPS, bounds), strict=True):
        assert torch.equal(got, want)
    for shard, (a, b) in enumerate(pairwise(bounds)):
        alone_x, alone_weight = cut.rms_norm_backward(g[a:b], x[a:b], weight, EPS, (0, b - a))
        assert torch.equal(alone_x, g_x[a:b]) and torch.equal(alone_weight[0], g_weight[shard])
        assert a < b or not g_weight[shard].any()


@pytest.mark.parametrize("rows", [64, 65, 200, 64 * 5 + 3])
def test_chunks_of_64_rows_are_added_in_a_tree(rows):
    g, x, weight = normal(rows, 20), normal(rows, 20, seed=1), normal(20, seed=2)
    parts = [
        ONE.rms_norm_backward(g[a : a + 64], x[a : a + 64], weight, EPS, (0, len(g[a : a + 64])))[1][0]
        for a in range(0, rows, 64)
    ]
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2])]
        parts = pairs + parts[2 * len(pairs) :]
    assert torch.equal(ONE.rms_norm_backward(g, x, weight, EPS, (0, rows))[1][0], parts[0])


@pytest.mark.parametrize("width", [1, 7, 64, 172])
def test_the_inverse_rms_is_the_forwards(width):
    x, ones = normal(1, width), torch.ones(width)
    got = ONE.rms_norm_backward(torch.ones(1, width), x, ones, EPS, (0, 1))[1]
    assert torch.equal(got, ONE.rms_norm(x, ones, EPS))


def test_a_norm_of_heads_and_of_nothing(cut):
    g, x, weight = normal(5, 3, 16), normal(5, 3, 16, seed=1), normal(16, seed=2)
    heads = ONE.rms_norm_backward(g, x, weight, EPS, (0, 6, 15))
    flat = ONE.rms_norm_backward(g.flatten(0, 1), x.flatten(0, 1), weight, EPS, (0, 6, 15))
    assert torch.equal(heads[0].flatten(0, 1), flat[0]) and torch.equal(heads[1], flat[1])
    none = cut.rms_norm_backward(g[:0], x[:0], weight, EPS, (0, 0, 0))
    assert none[0].shape == (0, 3, 16) and torch.equal(none[1], torch.zeros(2, 16))


@pytest.mark.parametrize("bounds", [(0, 4), (1, 5), (0, 6), (0, 3, 2, 5)])
def test_row_shards_that_do_not_fit_are_refused(bounds):
    with pytest.raises(ValueError, match="rise from 0 to 5"):
        ONE.rms_norm_backward(normal(5, 8), normal(5, 8), normal(8), EPS, bounds)


# ---- SwiGLU ----------------------------------------------------------------------------------------------------


@examples
@given(st.data(), rows_st, width_st)
def test_gradients_of_silu_mul(cut, data, rows, width):
    g, gate_up = normal(rows, width), normal(rows, 2 * width, seed=1) * 4
    got = ONE.silu_mul_backward(g, gate_up)
    (want,) = gradients(lambda x: F.silu(x[:, :width]) * x[:, width:], g, gate_up)
    assert_close(got, want, 4.0)
    assert_close(got, REFERENCE.silu_mul_backward(g, gate_up), 4.0)
    assert torch.equal(got, cut.silu_mul_backward(g, gate_up))
    _, a, b, _ = sorted(random_cuts(data.draw, width, 3))
    columns = [*range(a, b), *range(width + a, width + b)]
    alone = cut.silu_mul_backward(g[:, a:b].contiguous(), gate_up[:, columns].contiguous())
    assert torch.equal(alone, got[:, columns])


def test_gradients_of_silu_mul_use_the_forwards_silu():
    gate = normal(9, 77) * 8
    ones = torch.ones_like(gate)
    g_gate_up = ONE.silu_mul_backward(ones, torch.cat((gate, ones), 1))
    assert torch.equal(g_gate_up[:, 77:], ONE.silu_mul(torch.cat((gate, ones), 1)))


def test_gradients_of_silu_at_extremes():
    gate = torch.tensor([[-1e9, -200.0, -88.0, -0.0, 0.0, 100.0, 1e9, torch.nan]])
    got = ONE.silu_mul_backward(torch.ones_like(gate), torch.cat((gate, torch.ones_like(gate)), 1))
    assert got[0, :6].tolist() == pytest.approx([0, 0, 0, 0.5, 0.5, 1], abs=1e-30) and got[0, 6] == 1
    assert got[0, 7].isnan() and got[0, 15].isnan()
    with pytest.raises(ValueError, match="gate_up"):
        ONE.silu_mul_backward(gate, gate)


# ---- rotary positions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 20, 64])
def test_the_gradient_of_rotary_is_rotary_with_the_sine_negated(dim):
    g, x, table, positions = normal(9, 3, dim), normal(9, 3, dim, seed=1), normal(40, dim, seed=2), torch.arange(9) * 4
    back = torch.cat((table[:, : dim // 2], -table[:, dim // 2 :]), 1)
    cos, sin = table.double()[positions].unsqueeze(1).chunk(2, -1)

    def turn(x):
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    [want] = gradients(turn, g, x)
    assert_close(ONE.rotary(g, positions, back), want)


# ---- the loss --------------------------------------------------------------------------------------------------


def logits(rows: int, vocab: int) -> Tensor:
    z = normal(rows, vocab, seed=rows) * 5
    z[:, 1::7] = -math.inf
    return z


@examples
@given(st.integers(1, 60), st.integers(1, 1100), st.sampled_from([1, 2, 4, 8]))
def test_parts_of_a_log_sum_exp(cut, rows, vocab, shards):
    z, bounds = logits(rows, vocab), vocab_bounds(vocab, shards)
    parts = ONE.logsumexp_parts(z, bounds)
    assert parts.shape == (rows, shards, 2)
    for shard, (a, b) in enumerate(pairwise(bounds)):
        m, e = parts[:, shard].unbind(1)
        if a == b:
            assert (m == -math.inf).all() and not e.any()
        else:
            assert torch.equal(m, z[:, a:b].amax(1))
            assert_close(m + e.log(), torch.logsumexp(z[:, a:b].double(), 1), 3.0)
    assert torch.equal(parts, cut.logsumexp_parts(z, bounds))
    assert_close(parts, REFERENCE.logsumexp_parts(z, bounds), 10.0)
    kept = parts.clone()
    assert torch.equal(ONE.merge_logsumexp(parts), ONE.logsumexp(z, bounds)) and torch.equal(parts, kept)
    assert_close(REFERENCE.merge_logsumexp(parts), ONE.logsumexp(z, bounds), 3.0)
    half = shards // 2
    for own, want in ((bounds[: half + 1], parts[:, :half]), (bounds[half:], parts[:, half:])):
        if shards > 1:
            alone = cut.logsumexp_parts(z[:, own[0] : own[-1]].contiguous(), [bound - own[0] for bound in own])
            assert torch.equal(alone, want)


def test_parts_that_make_no_balanced_tree_are_refused():
    with pytest.raises(ValueError, match="3 shards"):
        ONE.merge_logsumexp(torch.zeros(2, 3, 2))
    assert ONE.merge_logsumexp(torch.zeros(0, 4, 2)).shape == (0,)
    nothing = torch.tensor([[[-math.inf, 0.0], [-math.inf, 0.0]]])
    assert ONE.merge_logsumexp(nothing).item() == REFERENCE.merge_logsumexp(nothing).item() == -math.inf


@examples
@given(st.data(), st.integers(1, 60), st.integers(1, 500))
def test_gradients_of_the_cross_entropy(cut, data, rows, vocab):
    z, g = logits(rows, vocab), normal(rows)
    targets = torch.randint(-1, vocab, (rows,), generator=torch.Generator().manual_seed(vocab))
    lse = ONE.logsumexp(z, (0, vocab))
    got, other, slow = z.clone(), z.clone(), z.clone()
    ONE.cross_entropy_backward_(got, lse, targets, g)
    cut.cross_entropy_backward_(other, lse, targets.int(), g)
    REFERENCE.cross_entropy_backward_(slow, lse, targets, g)
    assert torch.equal(got, other)
    hit = targets[:, None] == torch.arange(vocab)
    assert_close(got, g.double()[:, None] * (hit.double() - torch.softmax(z.double(), 1)))
    assert_close(got, slow)
    a, b = sorted(data.draw(st.tuples(st.integers(0, vocab), st.integers(0, vocab))))
    alone = z[:, a:b].contiguous()
    cut.cross_entropy_backward_(alone, lse, torch.where((targets >= a) & (targets < b), targets - a, -1), g)
    assert torch.equal(alone, got[:, a:b])


@pytest.mark.parametrize("bad", [-2, 30])
def test_a_target_outside_the_vocabulary_is_refused(bad):
    z = normal(2, 30)
    kept = z.clone()
    with pytest.raises(IndexError, match=f"target {bad}"):
        ONE.cross_entropy_backward_(z, torch.zeros(2), torch.tensor([3, bad]), torch.ones(2))
    assert torch.equal(z, kept)
    with pytest.raises(ValueError, match="3 targets"):
        ONE.cross_entropy_backward_(z, torch.zeros(2), torch.zeros(3), torch.ones(2))


# ---- dropout ---------------------------------------------------------------------------------------------------


@examples
@given(st.data(), rows_st, width_st, st.integers(-(2**63), 2**64), st.floats(0.01, 0.99))
def test_dropout_keeps_what_the_reference_keeps(cut, data, rows, width, key, rate):
    x, numbers, first = normal(rows, width), torch.arange(rows) * 2**33 - 5, data.draw(st.integers(0, 2**40))
    got = ONE.dropout(x, key, numbers, first, rate)
    assert torch.equal(got, REFERENCE.dropout(x, key, numbers, first, rate))
    assert torch.equal(got, cut.dropout(x, key, numbers, first, rate))
    _, a, b, _ = sorted(random_cuts(data.draw, width, 3))
    _, r, s, _ = sorted(random_cuts(data.draw, rows, 3))
    assert torch.equal(cut.dropout(x[r:s, a:b].contiguous(), key, numbers[r:s], first + a, rate), got[r:s, a:b])


def test_dropout_is_fair_and_depends_on_every_part_of_its_key():
    ones, numbers = torch.ones(100, 1000), torch.arange(100)
    draws = [
        ONE.dropout(ones, key, numbers + row, first, 0.3)
        for key, row, first in ((7, 0, 0), (8, 0, 0), (7 + 2**40, 0, 0), (7, 100, 0), (7, 0, 1000))
    ]
    for draw in draws:
        assert set(draw.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
        assert abs((draw == 0).double().mean() - 0.3) < 5 * math.sqrt(0.21 / draw.numel())
    same = torch.corrcoef(torch.stack(draws).flatten(1)) - torch.eye(len(draws))
    assert same.abs().max() < 5 / math.sqrt(ones.numel())
    by_column = torch.corrcoef(draws[0].T[:50]) - torch.eye(50)
    assert by_column.abs().max() < 0.6


def test_dropout_of_nothing_and_of_broken_values():
    x = torch.full((1, 400), torch.nan)
    for ops in (ONE, REFERENCE):
        assert ops.dropout(x, 1, torch.zeros(1), 0, 0.0) is x
        got = ops.dropout(x, 1, torch.zeros(1), 0, 0.5)
        assert 100 < (got == 0).sum() < 300 and ((got == 0) | got.isnan()).all()
        for rate in (1.0, -0.1, math.nan):
            with pytest.raises(ValueError, match="dropout rate"):
                ops.dropout(x, 1, torch.zeros(1), 0, rate)
