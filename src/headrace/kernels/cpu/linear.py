"""y = x @ W.T + bias on the CPU: one order of summation for every row count, output count and weight dtype.

An output is a sum over K in eight lanes (see `simd`). With `bounds` (0, …, K) each virtual shard is summed alone,
from lane 0 at its first input, and a balanced binary tree adds the shards' sums; the bias comes last. The three tiles
below, 4 rows × 2 outputs, 2 × 4 and 1 × 8, are eight such sums side by side, so which tile computes an output changes no bits.

Work is cut into blocks of 32 outputs, spread over threads. A bf16 or fp16 block that several rows read is widened
to fp32 once, which is exact.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.simd import (
    add8, fma8, hsum8x8, load1, load8, load8n, store1, store8, zero8,
)

__all__ = ["linear"]

BLOCK = 32
SHARDS = 16


@kernel
def _tile4x2(x, x0, x1, x2, x3, w, w0, w1, start, stop):
    """Sums over inputs start … stop − 1. Lane 2·row + output."""
    a0, a1, a2, a3 = zero8(), zero8(), zero8(), zero8()
    b0, b1, b2, b3 = zero8(), zero8(), zero8(), zero8()
    tail = (stop - start) & 7
    for k in range(start, stop - tail, 8):
        u, v = load8(w, w0 + k), load8(w, w1 + k)
        r = load8(x, x0 + k)
        a0, b0 = fma8(r, u, a0), fma8(r, v, b0)
        r = load8(x, x1 + k)
        a1, b1 = fma8(r, u, a1), fma8(r, v, b1)
        r = load8(x, x2 + k)
        a2, b2 = fma8(r, u, a2), fma8(r, v, b2)
        r = load8(x, x3 + k)
        a3, b3 = fma8(r, u, a3), fma8(r, v, b3)
    if tail:
        k = stop - tail
        u, v = load8n(w, w0 + k, tail), load8n(w, w1 + k, tail)
        r = load8n(x, x0 + k, tail)
        a0, b0 = fma8(r, u, a0), fma8(r, v, b0)
        r = load8n(x, x1 + k, tail)
        a1, b1 = fma8(r, u, a1), fma8(r, v, b1)
        r = load8n(x, x2 + k, tail)
        a2, b2 = fma8(r, u, a2), fma8(r, v, b2)
        r = load8n(x, x3 + k, tail)
        a3, b3 = fma8(r, u, a3), fma8(r, v, b3)
    return hsum8x8(a0, b0, a1, b1, a2, b2, a3, b3)


@kernel
def _tile1x8(x, x0, w, w0, w1, w2, w3, w4, w5, w6, w7, start, stop):
    """Sums over inputs start … stop − 1. Lane output."""
    a0, a1, a2, a3 = zero8(), zero8(), zero8(), zero8()
    a4, a5, a6, a7 = zero8(), zero8(), zero8(), zero8()
    tail = (stop - start) & 7
    for k in range(start, stop - tail, 8):
        r = load8(x, x0 + k)
        a0, a1 = fma8(r, load8(w, w0 + k), a0), fma8(r, load8(w, w1 + k), a1)
        a2, a3 = fma8(r, load8(w, w2 + k), a2), fma8(r, load8(w, w3 + k), a3)
        a4, a5 = fma8(r, load8(w, w4 + k), a4), fma8(r, load8(w, w5 + k), a5)
        a6, a7 = fma8(r, load8(w, w6 + k), a6), fma8(r, load8(w, w7 + k), a7)
    if tail:
        k = stop - tail
        r = load8n(x, x0 + k, tail)
        a0, a1 = fma8(r, load8n(w, w0 + k, tail), a0), fma8(r, load8n(w, w1 + k, tail), a1)
        a2, a3 = fma8(r, load8n(w, w2 + k, tail), a2), fma8(r, load8n(w, w3 + k, tail), a3)
        a4, a5 = fma8(r, load8n(w, w4 + k, tail), a4), fma8(r, load8n(w, w5 + k, tail), a5)
        a6, a7 = fma8(r, load8n(w, w6 + k, tail), a6), fma8(r, load8n(w, w7 + k, tail), a7)
    return hsum8x8(a0, a1, a2, a3, a4, a5, a6, a7)


@kernel
def _tree(partial, shards):
    """The balanced binary tree over `shards` vectors of eight sums: neighbours, then pairs of neighbours, …"""
    step = 1
    while step < shards:
        for i in range(0, shards - step, 2 * step):
            store8(partial, 8 * i, add8(load8(partial, 8 * i), load8(partial, 8 * (i + step))))
        step *= 2


@kernel
def _put(partial, lane, bias, y, row, n, width):
    """One output, the bias added where there is one."""
    value = load1(partial, lane)
    if bias.size:
        value += load1(bias, n)
    store1(y, row * width + n, value)


@kernel
def _rows4(x, row, rows, inputs, w, w_row, first, last, width, bias, bounds, y, partial):
    """Rows row … row + 3 (clamped to `rows`) by outputs first … last − 1; w's row 0 is output `w_row`."""
    r1, r2, r3 = min(row + 1, rows - 1), min(row + 2, rows - 1), min(row + 3, rows - 1)
    shards = bounds.size - 1
    for n in range(first, last, 2):
        m = min(n + 1, last - 1)
        for s in range(shards):
            store8(partial, 8 * s, _tile4x2(x, row * inputs, r1 * inputs, r2 * inputs, r3 * inputs, w,
                                            (n - w_row) * inputs, (m - w_row) * inputs, bounds[s], bounds[s + 1]))
        _tree(partial, shards)
        for i in range(min(4, rows - row)):
            _put(partial, 2 * i, bias, y, row + i, n, width)
            _put(partial, 2 * i + 1, bias, y, row + i, m, width)


@kernel
def _row1(x, row, inputs, w, w_row, first, last, width, bias, bounds, y, partial):
    """One row by outputs first … last − 1."""
    shards = bounds.size - 1
    for n in range(first, last, 8):
        end = (last - 1 - w_row) * inputs
        w0 = (n - w_row) * inputs
        w1, w2, w3 = min(w0 + inputs, end), min(w0 + 2 * inputs, end), min(w0 + 3 * inputs, end)
        w4, w5, w6 = min(w0 + 4 * inputs, end), min(w0 + 5 * inputs, end), min(w0 + 6 * inputs, end)
        w7 = min(w0 + 7 * inputs, end)
        for s in range(shards):
            store8(partial, 8 * s, _tile1x8(x, row * inputs, w, w0, w1, w2, w3, w4, w5, w6, w7,
                                            bounds[s], bounds[s + 1]))
        _tree(partial, shards)
        for i in range(min(8, last - n)):
            _put(partial, i, bias, y, row, n + i, width)


@kernel
def _widen(w, start, count, wide):
    """wide[0 … count − 1] = fp32 of w[start …]."""
    whole = count & ~7
    for k in range(0, whole, 8):
        store8(wide, k, load8(w, start + k))
    for k in range(whole, count):
        store1(wide, k, load1(w, start + k))


@kernel
def _block(x, rows, inputs, w, w_row, first, last, width, bias, bounds, y, partial):
    """All rows by one block of outputs: fours, then a rest of 3 as a clamped four or of 1 or 2 singly."""
    row = 0
    while rows - row > 2:
        _rows4(x, row, rows, inputs, w, w_row, first, last, width, bias, bounds, y, partial)
        row += 4
    while row < rows:
        _row1(x, row, inputs, w, w_row, first, last, width, bias, bounds, y, partial)
        row += 1


@kernel(parallel=True)
def linear(x, rows, inputs, w, width, bias, bounds, y):
    """y[rows, width] = x[rows, inputs] @ w[width, inputs].T + bias, all flat and contiguous, y and x fp32.

    `bias` is fp32 [width], or empty for none. `bounds` is int64 [V + 1] from 0 to `inputs`.
    """
    for block in prange((width + BLOCK - 1) // BLOCK):
        first = block * BLOCK
        last = min(first + BLOCK, width)
        partial = np.empty(8 * SHARDS, np.float32)
        if rows > 8 and w.itemsize != 4:
            wide = np.empty((last - first) * inputs, np.float32)
            _widen(w, first * inputs, wide.size, wide)
            _block(x, rows, inputs, wide, first, first, last, width, bias, bounds, y, partial)
        else:
            _block(x, rows, inputs, w, 0, first, last, width, bias, bounds, y, partial)
