"""The products behind a linear's gradients: right, in one order whatever the shape and the threads."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels.cpu import CpuOps
from headrace.kernels.reference import ReferenceOps
from headrace.kernels.shards import tree
from kernels.product_kit import (
    BOUNDS,
    CHUNK,
    DTYPES,
    OUTPUTS,
    assert_bits,
    between_nans,
    bounds_spans,
    definition,
    normal,
    top,
)

ONE, TWO, REFERENCE = CpuOps(threads=1), CpuOps(threads=2), ReferenceOps()
TERMS = (1, 255, 256, 257, 511, 512, 513)
ROWS = (1, 2, 4, 5, 8, 9, 16, 17, 33)
examples = settings(max_examples=30, deadline=None, derandomize=True)


def assert_close(got: Tensor, want: Tensor, terms: int) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * max(1, terms) ** 0.5)


# ---- the law ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", (0, *TERMS, 2100))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_inputs_is_the_defined_sum(dtype, terms):
    """Of every number of rows by every number of inputs; the terms are the weight's outputs."""
    g, weight = between_nans(normal(max(ROWS), terms)), normal(terms, max(OUTPUTS), seed=1).to(dtype)
    wanted, spans = definition(g, weight.T), ((0, 0, 0, terms),)
    for rows, inputs in product(ROWS, OUTPUTS):
        got = ONE.linear_backward_input(top(g, rows), between_nans(weight[:, :inputs]), spans)
        assert_bits(got, wanted[:rows, :inputs], rows, inputs)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_of_outputs_are_summed_in_a_balanced_tree(dtype, bounds):
    spans, terms = bounds_spans(bounds), bounds[-1]
    g, weight = between_nans(normal(max(ROWS), terms)), between_nans(normal(terms, 47, seed=1).to(dtype))
    wanted = definition(g, weight.T, None, spans)
    for rows in ROWS:
        assert_bits(TWO.linear_backward_input(top(g, rows), weight, spans), wanted[:rows], rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_spans_of_a_shard_and_rows_that_shards_share(dtype):
    """Each span starts a chunk of its own."""
    g, weight = normal(33, 700), normal(640, 33, seed=1).to(dtype)
    for spans in (
        ((0, 0, 0, 15), (0, 30, 30, 10), (1, 15, 15, 15), (1, 50, 30, 10)),
        ((0, 400, 40, 270), (0, 0, 300, 15), (1, 15, 0, 0), (2, 20, 20, 300), (2, 690, 630, 10), (3, 0, 0, 600)),
    ):
        wanted, exact = definition(g, weight.T, None, spans), torch.zeros(33, 33, dtype=torch.float64)
        for _, column, row, count in spans:
            exact += g[:, column : column + count].double() @ weight[row : row + count].double()
        for rows in ROWS:
            assert_bits(TWO.linear_backward_input(top(g, rows), weight, spans), wanted[:rows], rows)
        assert_close(wanted, exact, 1000)
        assert_close(REFERENCE.linear_backward_input(g, weight, spans), exact, 1000)


@pytest.mark.parametrize("terms", (0, *TERMS, 2100))
def test_the_gradient_of_the_weight_is_the_defined_sum(terms):
    """Of every number of outputs by every number of inputs; the terms are rows, and chunks are added to `into`."""
    g, x = normal(terms, max(ROWS)), normal(terms, max(OUTPUTS), seed=1)
    earlier = normal(max(ROWS), max(OUTPUTS), seed=2)
    wanted, added = definition(g.T, x.T), definition(g.T, x.T, None, None, earlier)
    for outputs, inputs in product(ROWS, OUTPUTS):
        left, right = between_nans(g[:, :outputs]), between_nans(x[:, :inputs])
        assert_bits(ONE.linear_backward_weight(left, right), wanted[:outputs, :inputs], outputs, inputs)
        into = earlier[:outputs, :inputs].clone()
        assert ONE.linear_backward_weight(left, right, into) is into
        assert_bits(into, added[:outputs, :inputs], outputs, inputs)


@pytest.mark.parametrize("terms", (1, 16, 256, 257, 600))
@pytest.mark.parametrize("g,chain", [(-0.0, 0.0), (-1e-40, -0.0)], ids=["a product of −0", "a product too small"])
def test_the_sign_of_zero(g, chain, terms):
    """Chains start at +0; the first chunk and the first shard are stored; a shard without terms is +0."""
    for rows, inputs in product((1, 2, 4, 9, 16), (1, 17, 64)):
        left, right = torch.full((rows, terms), g), torch.full((terms, inputs), 1e-6)
        zero = torch.full((rows, inputs), chain)
        whole, empty = ((0, 0, 0, terms),), ((0, 0, 0, terms), (1, 0, 0, 0))
        assert_bits(ONE.linear_backward_input(left, right, whole), zero, rows, inputs)
        assert_bits(ONE.linear_backward_input(left, right, empty), zero.abs(), rows, inputs)
        turned = left.T.contiguous()
        assert_bits(ONE.linear_backward_weight(turned, right), zero, rows, inputs)
        for into in (torch.full((rows, inputs), sign) for sign in (0.0, -0.0)):
            wanted = into + zero
            assert_bits(ONE.linear_backward_weight(turned, right, into), wanted, rows, inputs)


@pytest.mark.parametrize("terms", (1, 33, 300))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype, terms):
    spans = ((0, 0, 0, terms),)
    for rows, value in product(ROWS, (torch.nan, torch.inf)):
        g, weight = normal(rows, terms), normal(terms, 33, seed=1).to(dtype)
        calm = ONE.linear_backward_input(g, weight, spans)
        g[rows // 2], weight[0, 16] = value, value
        y = ONE.linear_backward_input(g, weight, spans)
        assert not y[rows // 2].isfinite().any() and not y[:, 16].isfinite().any()
        if dtype == torch.float32:
            assert_bits(ONE.linear_backward_weight(g.T.contiguous(), weight), y, rows, value)
        y[rows // 2], y[:, 16] = calm[rows // 2], calm[:, 16]
        assert_bits(y, calm, rows, value)


# ---- any shapes, close to float64 ------------------------------------------------------------------------------


@examples
@given(st.data(), st.integers(1, 150), st.integers(0, 700), st.integers(1, 300), st.sampled_from(DTYPES))
def test_by_the_inputs(data, rows, outputs, inputs, dtype):
    shards = data.draw(st.sampled_from((1, 2, 4)))
    cuts = data.draw(st.lists(st.integers(0, outputs), min_size=shards - 1, max_size=shards - 1))
    spans = tuple((i, a, a, b - a) for i, (a, b) in enumerate(pairwise((0, *sorted(cuts), outputs))))
    g, weight = normal(rows, outputs), normal(outputs, inputs, seed=1).to(dtype)
    got = ONE.linear_backward_input(g, weight, spans)
    assert_close(got, g.double() @ weight.double(), outputs)
    assert_close(REFERENCE.linear_backward_input(g, weight, spans), g.double() @ weight.double(), outputs)
    assert_bits(got, TWO.linear_backward_input(g, weight, spans))
    row = data.draw(st.integers(0, rows - 1))
    assert_bits(got[row], ONE.linear_backward_input(g[row : row + 1], weight, spans)[0])
    k = data.draw(st.integers(1, inputs))
    assert_bits(got[:, :k], TWO.linear_backward_input(g, weight[:, :k].contiguous(), spans))
    alone = [
        ONE.linear_backward_input(g[:, a : a + n].contiguous(), weight[a : a + n].contiguous(), ((0, 0, 0, n),))
        for _, a, _, n in spans
    ]
    assert_bits(got, tree(alone))


@examples
@given(st.data(), st.integers(0, 700), st.integers(1, 300), st.integers(1, 150))
def test_by_the_weight(data, rows, outputs, inputs):
    g, x = normal(rows, outputs), normal(rows, inputs, seed=1)
    got = ONE.linear_backward_weight(g, x)
    assert_close(got, g.double().T @ x.double(), rows)
    assert_close(REFERENCE.linear_backward_weight(g, x), g.double().T @ x.double(), rows)
    assert_bits(got, TWO.linear_backward_weight(g, x))
    a, b = sorted(data.draw(st.tuples(st.integers(0, outputs), st.integers(0, outputs))))
    assert_bits(got[a:b], TWO.linear_backward_weight(g[:, a:b].contiguous(), x))
    into = torch.zeros(outputs, inputs)
    for start in range(0, rows, 2 * CHUNK):
        ONE.linear_backward_weight(g[start : start + 2 * CHUNK], x[start : start + 2 * CHUNK], into)
    assert torch.equal(into, got)


def test_both_gradients_are_one_product():
    g, weight = normal(3, 2 * CHUNK + 5), normal(2 * CHUNK + 5, 7, seed=1)
    got = ONE.linear_backward_input(g, weight, ((0, 0, 0, len(weight)),))
    assert_bits(ONE.linear_backward_weight(g.T.contiguous(), weight), got)
    assert_bits(ONE.linear(g, weight.T.contiguous()), got)


# ---- what is refused, and what is empty ------------------------------------------------------------------------


def test_no_rows_and_no_inputs():
    spans = ((0, 0, 0, 8),)
    assert ONE.linear_backward_input(normal(0, 8), normal(8, 4), spans).shape == (0, 4)
    assert ONE.linear_backward_input(normal(3, 8), normal(8, 0), spans).shape == (3, 0)
    assert ONE.linear_backward_weight(normal(3, 0), normal(3, 4)).shape == (0, 4)
    assert ONE.linear_backward_weight(normal(3, 8), normal(3, 0)).shape == (8, 0)


@pytest.mark.parametrize(
    "spans",
    [
        ((0, 0, 0, 9),),
        ((0, 1, 0, 8),),
        ((1, 0, 0, 8),),
        ((1, 0, 0, 4), (0, 4, 4, 4)),
        ((0, 0, 0, 2), (1, 2, 2, 2), (2, 4, 4, 4)),
        ((0, -1, 0, 2),),
    ],
)
def test_spans_that_do_not_fit_are_refused(spans):
    with pytest.raises(ValueError, match="spans="):
        ONE.linear_backward_input(normal(2, 8), normal(8, 4), spans)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not go"):
        ONE.linear_backward_weight(normal(3, 8), normal(4, 5))
    with pytest.raises(ValueError, match="do not go"):
        ONE.linear_backward_weight(normal(3, 8), normal(3, 5), torch.zeros(5, 8))
