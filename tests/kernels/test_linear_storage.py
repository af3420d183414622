"""A product's bits do not depend on how its operands are stored, and nothing beside the result is written."""

import itertools

import pytest
import torch

from headrace.kernels.cpu import CpuOps
from headrace.kernels.cpu.launch import set_threads
from headrace.kernels.cpu.product import PASS
from headrace.kernels.panels import Panels
from kernels.product_kit import (
    DTYPES,
    OUTPUTS,
    STORAGES,
    assert_bits,
    bounds_spans,
    definition,
    multiply,
    normal,
    operands,
    top,
)

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 40)
BOUNDS = ((0, 1), (0, 255), (0, 300), (0, 32, 32, 225, 513), (0, 0, 257, 300, 300))
LONG = ((0, 2100), (0, 4200), (0, 1000, 1000, 2050, 4200), (0, 0, 4096), (0, 2049, 2050), (0, 2048), (0, 2300, 2300))


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_storage_gives_the_defined_sum(dtype, storage, bounds):
    """Of a left operand that lies row by row, and of one that lies term by term, as a gradient's does."""
    x, w, bias = operands(max(ROWS), max(OUTPUTS), bounds[-1], dtype)
    spans = bounds_spans(bounds)
    plain, biased = definition(x, w, None, spans), definition(x, w, bias, spans)
    for rows, outputs, turned in itertools.product(ROWS, OUTPUTS, (False, True)):
        got = multiply(x[:rows], w[:outputs], storage, None, spans, turned=turned)
        assert_bits(got, plain[:rows, :outputs], rows, outputs, turned)
        got = multiply(x[:rows], w[:outputs], storage, bias[:outputs], spans, turned=turned)
        assert_bits(got, biased[:rows, :outputs], rows, outputs, turned)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_have_the_bits_of_rows(dtype, bounds):
    """The definition aside: the two are compared with each other."""
    x, w, bias = operands(max(ROWS), max(OUTPUTS), bounds[-1], dtype, seed=7)
    for rows, outputs in itertools.product(ROWS, OUTPUTS):
        job = x[:rows], w[:outputs]
        panels, by_rows = (multiply(*job, storage, bias[:outputs], bounds_spans(bounds)) for storage in STORAGES[::-2])
        assert_bits(panels, by_rows, rows, outputs)


@pytest.mark.parametrize("bounds", LONG)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_terms_than_one_pass_packs(dtype, storage, bounds):
    assert bounds[-1] >= PASS
    x, w, bias = operands(17, 65, bounds[-1], dtype)
    spans = bounds_spans(bounds)
    wanted = definition(x, w, bias, spans)
    for rows, outputs, turned in itertools.product((1, 2, 8, 9, 16, 17), (1, 17, 65), (False, True)):
        got = multiply(x[:rows], w[:outputs], storage, bias[:outputs], spans, turned=turned)
        assert_bits(got, wanted[:rows, :outputs], rows, outputs, turned)


@pytest.mark.parametrize("rows,outputs,terms", [(150, 200, 2100), (70, 1000, 600), (1, 3000, 500), (600, 17, 2500)])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("threads", (0, 1, 2))
def test_tasks_and_threads_change_no_bits(threads, storage, rows, outputs, terms):
    x, w, bias = operands(rows, outputs, terms, torch.bfloat16)
    spans = bounds_spans((0, 480, terms))
    wanted = definition(x, w, bias, spans)
    set_threads(max(1, threads))
    for turned in (False, True):
        assert_bits(multiply(x, w, storage, bias, spans, turned=turned, threads=threads), wanted, turned)


@pytest.mark.parametrize("bounds", ((0, 1), (0, 513), (0, 2100), (0, 32, 300), (0, 0, 300)))
@pytest.mark.parametrize("storage", STORAGES)
def test_a_product_may_be_added_to_what_is_there(storage, bounds):
    """Chunk by chunk: earlier + first chunk, + second, …"""
    x, w, _ = operands(40, 33, bounds[-1], torch.float32)
    spans, earlier = bounds_spans(bounds), normal(40, 33, seed=9)
    wanted = definition(x, w, None, spans, earlier)
    for rows, turned in itertools.product((1, 2, 4, 8, 9, 16, 40), (False, True)):
        got = multiply(x[:rows], w, storage, None, spans, earlier[:rows], turned)
        assert_bits(got, wanted[:rows], rows, turned)


@pytest.mark.parametrize("storage", STORAGES)
def test_spans_lie_anywhere(storage):
    """A shard may have several, and a term may be in several shards."""
    x, w, _ = operands(33, 47, 700, torch.bfloat16)
    spans = ((0, 400, 0, 270), (0, 0, 300, 15), (1, 15, 0, 0), (2, 20, 20, 300), (2, 500, 5, 1), (3, 0, 0, 32))
    wanted = definition(x, w, None, spans)
    for rows, turned in itertools.product((1, 2, 4, 8, 9, 16, 33), (False, True)):
        assert_bits(multiply(x[:rows], w, storage, None, spans, turned=turned), wanted[:rows], rows, turned)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype, storage):
    for rows in (1, 4, 8, 9, 17, 40):
        x, w, bias = operands(rows, 33, 300, dtype)
        calm = multiply(x, w, storage, bias)
        for value, row, output in itertools.product((torch.nan, -torch.inf), {0, rows - 1}, (0, 15, 32)):
            left, right = top(x, rows), w.clone()
            left[row, 0], right[output] = value, value
            y = multiply(left, right, storage, bias)
            assert not y[row].isfinite().any() and not y[:, output].isfinite().any()
            y[row], y[:, output] = calm[row], calm[:, output]
            assert_bits(y, calm, rows, value, row, output)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_set_multiplies_panels_as_rows(dtype, outputs):
    ops = CpuOps(threads=2)
    x, w, bias = operands(70, outputs, 300, dtype)
    panels, bounds = ops.store(outputs, 300, dtype), (0, 192, 300)
    assert isinstance(panels, Panels)
    panels.put(0, w)
    for rows in (*ROWS, 70):
        some = top(x, rows)
        assert_bits(ops.linear(some, panels, bias, bounds), ops.linear(some, w, bias, bounds), rows)
    ids = torch.tensor([outputs - 1, 0, outputs // 2])
    assert_bits(ops.embedding(ids, panels), ops.embedding(ids, w))
