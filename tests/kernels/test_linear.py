"""A linear's product: the defined sum, whatever is computed with it, and close to float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.cpu import CpuOps
from headrace.kernels.shards import shard_bounds
from kernels.product_kit import (
    BOUNDS,
    DTYPES,
    OUTPUTS,
    ROWS,
    assert_bits,
    between_nans,
    bounds_spans,
    definition,
    operands,
    top,
)

TERMS = (1, 255, 256, 257, 511, 512, 513)
FEW_ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 33)


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    return CpuOps()


# ---- the law ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_what_it_is_defined_to_be(ops, dtype, terms):
    """Of every number of rows by every number of outputs: so rows and outputs do not see each other either."""
    x, w, bias = operands(max(ROWS), max(OUTPUTS), terms, dtype)
    plain, biased = definition(x, w), definition(x, w, bias)
    for rows, outputs in itertools.product(ROWS, OUTPUTS):
        some, part = top(x, rows), top(w, outputs)
        assert_bits(ops.linear(some, part), plain[:rows, :outputs], rows, outputs)
        assert_bits(ops.linear(some, part, top(bias, outputs)), biased[:rows, :outputs], rows, outputs)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_summed_in_a_balanced_tree(ops, dtype, bounds):
    x, w, bias = operands(max(FEW_ROWS), 47, bounds[-1], dtype)
    for added in (None, bias):
        wanted = definition(x, w, added, bounds_spans(bounds))
        for rows in FEW_ROWS:
            assert_bits(ops.linear(top(x, rows), w, added, bounds), wanted[:rows], rows)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from((1, 2, 4, 8, 16)), st.integers(1, 40), st.integers(1, 70), st.sampled_from(DTYPES))
def test_any_shards(data, shards, rows, outputs, dtype):
    sizes = st.sampled_from((0, 1, 32, 192, 255, 256, 257, 300))
    bounds = (0, *itertools.accumulate(data.draw(st.lists(sizes, min_size=shards, max_size=shards))))
    x, w, bias = operands(rows, outputs, bounds[-1], dtype)
    wanted = definition(x, w, bias, bounds_spans(bounds))
    assert_bits(CpuOps(threads=2).linear(x, w, bias, bounds), wanted)


@pytest.mark.parametrize(
    "rows,outputs,terms", [(40, 33, 1100), (300, 9, 1033), (17, 70, 520), (2, 40, 2000), (3, 1, 0)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_products(ops, dtype, rows, outputs, terms):
    x, w, bias = operands(rows, outputs, terms, dtype)
    for bounds in ((0, terms), shard_bounds(terms, 2)):
        y = ops.linear(x, w, bias, bounds)
        assert_bits(y, definition(x, w, bias, bounds_spans(bounds)))
        assert (y - (x.double() @ w.double().T + bias)).abs().max() < 3e-4


def test_a_bias_may_have_16_bits(ops):
    x, w, bias = operands(9, 33, 300, torch.bfloat16)
    for rows in (1, 9):
        some, bias = top(x, rows), between_nans(bias.bfloat16())
        assert_bits(ops.linear(some, w, bias), definition(some, w, bias))


# ---- zeros -----------------------------------------------------------------------------------------------------

ZEROS = (
    ("a product of −0", -0.0, 0.0),
    ("a product too small for fp32", -1e-40, -0.0),
)
"""(x, the chain of any number of its products with 1e-6)."""
PLUS, MINUS = torch.tensor(0.0), torch.tensor(-0.0)


@pytest.mark.parametrize("terms", (1, 16, 256, 257, 600))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x,chain", [pair[1:] for pair in ZEROS], ids=[pair[0] for pair in ZEROS])
def test_the_sign_of_zero(ops, x, chain, dtype, terms):
    """A chain starts at +0; the first chunk and the first shard are stored, and no bias is not a bias of +0."""
    halves, empty = (0, terms // 2, terms), (0, terms, terms)
    for rows, outputs in itertools.product((1, 2, 4, 8, 9, 16), (1, 17, 64)):
        left, right = torch.full((rows, terms), x), torch.full((outputs, terms), 1e-6).to(dtype)
        zero, bias = torch.full((rows, outputs), chain), torch.full((outputs,), -0.0)
        assert_bits(definition(left, right), zero)
        assert_bits(ops.linear(left, right), zero, rows, outputs)
        assert_bits(ops.linear(left, right, bias), zero, rows, outputs)
        assert_bits(ops.linear(left, right, -bias), zero.abs(), rows, outputs)
        if terms > 1:
            assert_bits(ops.linear(left, right, None, halves), zero, rows, outputs)
        assert_bits(ops.linear(left, right, None, empty), zero.abs(), rows, outputs)


@pytest.mark.parametrize("bounds", [(0, 0), (0, 0, 0), (0,) * 17])
def test_a_sum_of_nothing_is_plus_zero(ops, bounds):
    for rows in FEW_ROWS:
        x, w, zeros = torch.empty(rows, 0), torch.empty(17, 0), torch.zeros(rows, 17)
        assert_bits(ops.linear(x, w, None, bounds), zeros)
        assert_bits(ops.linear(x, w, torch.full((17,), -0.0), bounds), zeros)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_are_numbers(ops, dtype):
    x, w, bias = operands(17, 33, 300, dtype)
    x *= 1e-38
    for rows in FEW_ROWS[:-1]:
        y = ops.linear(top(x, rows), w * 0.01, bias * 1e-39)
        assert ((y != 0) & (y.abs() < 1e-38)).any()
        assert_bits(y, definition(x[:rows], w * 0.01, bias * 1e-39))


# ---- neighbours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", (1, 33, 300, 513))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(ops, dtype, terms):
    x, w, bias = operands(max(FEW_ROWS), 33, terms, dtype)
    for rows in FEW_ROWS:
        calm = ops.linear(top(x, rows), w, bias)
        for value, row, output in itertools.product((torch.nan, torch.inf), {0, rows // 2, rows - 1}, (0, 16, 32)):
            left, right = top(x, rows), between_nans(w)
            left[row], right[output, -1] = value, value
            y = ops.linear(left, right, bias)
            assert not y[row].isfinite().any() and not y[:, output].isfinite().any()
            assert_bits(y, definition(left, right, bias))
            y[row], y[:, output] = calm[row], calm[:, output]
            assert_bits(y, calm, rows, value, row, output)


@pytest.mark.parametrize("terms", (1, 7, 31, 33, 172))
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_outputs_do_not_see_each_other(ops, dtype, terms):
    """Rows 1–9 by outputs 1–40, with and without shards: the bits of the row alone, and of the output alone."""
    x, w, bias = operands(9, 40, terms, dtype)
    for bounds in (None, shard_bounds(terms, 4)):
        alone = torch.cat([ops.linear(x[i : i + 1], w, bias, bounds) for i in range(9)])
        single = torch.cat([ops.linear(x, w[n : n + 1], bias[n : n + 1], bounds) for n in range(40)], dim=1)
        assert_bits(alone, single)
        for rows, outputs in itertools.product(range(1, 10), range(1, 41)):
            y = ops.linear(x[:rows], w[:outputs], bias[:outputs], bounds)
            assert_bits(y, alone[:rows, :outputs], rows, outputs, bounds)


def test_shards_make_another_sum(ops):
    """The mutant of the tests above: were `bounds` ignored, they would still agree with each other."""
    x, w, _ = operands(4, 16, 172, torch.float32)
    assert not torch.equal(ops.linear(x, w), ops.linear(x, w, None, shard_bounds(172, 4)))


def test_chunks_make_another_sum():
    """The same of chunks: one chain of all terms is not the sum of two."""
    x, w, _ = operands(4, 16, 300, torch.float32)
    assert not torch.equal(definition(x, w), definition(x, w, None, bounds_spans((0, 150, 300))))


@pytest.mark.parametrize("width", (172, 2000))
def test_a_shard_is_its_own_product(ops, width):
    """What tensor parallelism relies on: a rank's shard alone, and the tree above it, give the whole."""
    x, w, _ = operands(5, 24, width, torch.bfloat16)
    bounds = shard_bounds(width, 4)
    parts = [ops.linear(x[:, a:b].contiguous(), w[:, a:b].contiguous()) for a, b in itertools.pairwise(bounds)]
    assert_bits(ops.linear(x, w, None, bounds), (parts[0] + parts[1]) + (parts[2] + parts[3]))


@pytest.mark.parametrize("rows", [1, 4, 5, 33])
def test_threads_change_no_bits(rows):
    x, w, bias = operands(rows, 1000, 300, torch.bfloat16)
    one, two = (CpuOps(threads=n).linear(x, w, bias) for n in (1, 2))
    assert_bits(one, two)
    assert_bits(one, definition(x, w, bias))


# ---- what is refused, and what is empty ------------------------------------------------------------------------


def test_no_rows_and_no_outputs(ops):
    assert ops.linear(torch.empty(0, 16), torch.ones(8, 16)).shape == (0, 8)
    assert ops.linear(torch.ones(3, 16), torch.empty(0, 16)).shape == (3, 0)
    assert ops.linear(torch.ones(3, 16), torch.empty(0, 16), torch.empty(0)).shape == (3, 0)


@pytest.mark.parametrize(
    "bounds", [(0, 8), (1, 16), (0, 12, 8, 16, 16), (0, 4, 8, 16), (-1, 16), (0, 17), (0, *[1] * 31, 16)]
)
def test_impossible_shards_are_refused(ops, bounds):
    with pytest.raises(ValueError, match="bounds"):
        ops.linear(torch.ones(1, 16), torch.ones(8, 16), None, bounds)


@pytest.mark.parametrize(
    ("match", "x", "weight", "bias"),
    [
        ("inputs", torch.ones(1, 15), torch.ones(8, 16), None),
        ("contiguous", torch.ones(16, 3).T, torch.ones(8, 16), None),
        ("contiguous", torch.ones(3, 16), torch.ones(16, 8).T, None),
        ("float64", torch.ones(3, 16), torch.ones(8, 16, dtype=torch.float64), None),
        ("contiguous", torch.ones(3, 16), torch.ones(8, 16), torch.ones(8, 2)[:, 0]),
    ],
)
def test_what_a_kernel_cannot_read_is_refused(ops, match, x, weight, bias):
    with pytest.raises(ValueError, match=match):
        ops.linear(x, weight, bias)
