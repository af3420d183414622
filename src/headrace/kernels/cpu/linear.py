"""y = x @ W.T + bias on the CPU: one order of summation for every row count, output count and weight dtype.

An output is a sum over K in eight lanes (see `simd`). With `bounds` (0, …, K) each virtual shard is summed alone,
from lane 0 at its first input, and a balanced binary tree adds the shards' sums; the bias comes last. A tile is
several such sums side by side, so which tile computes an output changes no bits:

    1 row  × 8 outputs    a few rows: weights are read once, at the memory's bandwidth
    4 rows × 2 outputs    more rows: eight accumulators fill sixteen 256-bit registers
    8 rows × 4 outputs    AVX-512: sixteen accumulators of two rows each (see `simd16`), x packed in row pairs

Work is cut into blocks of 32 outputs, spread over threads. A bf16 or fp16 block that many rows read is widened to
fp32 once, which is exact. Sums of a group of rows wait in `sums` [shard, row of the group, output of the block].
"""

from __future__ import annotations

import numpy as np
from numba import prange

from headrace.kernels.cpu.launch import cpu_features, kernel
from headrace.kernels.cpu.simd import (
    add8, fma8, hsum8x8, lane8, load1, load8, load8n, pointer, store1, store8, store8n, zero8,
)
from headrace.kernels.cpu.simd16 import fma16, hsum16x8, load16, store4, twice8, zero16

__all__ = ["SHARDS", "WIDE", "linear16", "linear32", "packed_size"]

WIDE = "+avx512f" in cpu_features().split(",")
"""Whether groups of eight rows go through 512-bit registers."""

SHARDS = 16
"""Most virtual shards that a sum may have."""

BLOCK = 32
GROUP = 8
STRIDE = GROUP * BLOCK  # of `sums`, per shard
PANEL = 1 << 18  # elements of x in a panel


# ---- tiles -----------------------------------------------------------------------------------------------------

@kernel
def _tile1x8(x, x0, w, w0, w1, w2, w3, w4, w5, w6, w7, start, stop, sums, to):
    """Sums over inputs start … stop − 1 of one row and eight outputs, to sums[to … to + 7]."""
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
    store8(sums, to, hsum8x8(a0, a1, a2, a3, a4, a5, a6, a7))


@kernel
def _tile4x2(x, x0, x1, x2, x3, w, w0, w1, start, stop, sums, to):
    """The same of four rows and two outputs, to sums[to + 32·row + output]."""
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
    total = hsum8x8(a0, b0, a1, b1, a2, b2, a3, b3)
    for row in range(4):
        store1(sums, to + row * BLOCK, lane8(total, 2 * row))
        store1(sums, to + row * BLOCK + 1, lane8(total, 2 * row + 1))


@kernel
def _tile8x4(packed, x0, w, w0, w1, w2, w3, count, sums, to):
    """The same of eight packed rows and four outputs, over `count` inputs from packed[x0] and w[w0 …]."""
    a0, a1, a2, a3 = zero16(), zero16(), zero16(), zero16()
    b0, b1, b2, b3 = zero16(), zero16(), zero16(), zero16()
    c0, c1, c2, c3 = zero16(), zero16(), zero16(), zero16()
    d0, d1, d2, d3 = zero16(), zero16(), zero16(), zero16()
    tail = count & 7
    whole = count - tail
    for k in range(0, whole, 8):
        p = x0 + GROUP * k
        r0, r1, r2, r3 = load16(packed, p), load16(packed, p + 16), load16(packed, p + 32), load16(packed, p + 48)
        u = twice8(load8(w, w0 + k))
        a0, a1, a2, a3 = fma16(r0, u, a0), fma16(r1, u, a1), fma16(r2, u, a2), fma16(r3, u, a3)
        u = twice8(load8(w, w1 + k))
        b0, b1, b2, b3 = fma16(r0, u, b0), fma16(r1, u, b1), fma16(r2, u, b2), fma16(r3, u, b3)
        u = twice8(load8(w, w2 + k))
        c0, c1, c2, c3 = fma16(r0, u, c0), fma16(r1, u, c1), fma16(r2, u, c2), fma16(r3, u, c3)
        u = twice8(load8(w, w3 + k))
        d0, d1, d2, d3 = fma16(r0, u, d0), fma16(r1, u, d1), fma16(r2, u, d2), fma16(r3, u, d3)
    if tail:
        p = x0 + GROUP * whole
        r0, r1, r2, r3 = load16(packed, p), load16(packed, p + 16), load16(packed, p + 32), load16(packed, p + 48)
        u = twice8(load8n(w, w0 + whole, tail))
        a0, a1, a2, a3 = fma16(r0, u, a0), fma16(r1, u, a1), fma16(r2, u, a2), fma16(r3, u, a3)
        u = twice8(load8n(w, w1 + whole, tail))
        b0, b1, b2, b3 = fma16(r0, u, b0), fma16(r1, u, b1), fma16(r2, u, b2), fma16(r3, u, b3)
        u = twice8(load8n(w, w2 + whole, tail))
        c0, c1, c2, c3 = fma16(r0, u, c0), fma16(r1, u, c1), fma16(r2, u, c2), fma16(r3, u, c3)
        u = twice8(load8n(w, w3 + whole, tail))
        d0, d1, d2, d3 = fma16(r0, u, d0), fma16(r1, u, d1), fma16(r2, u, d2), fma16(r3, u, d3)
    _put8x4(hsum16x8(a0, b0, c0, d0, a1, b1, c1, d1), sums, to)
    _put8x4(hsum16x8(a2, b2, c2, d2, a3, b3, c3, d3), sums, to + 4 * BLOCK)


@kernel
def _put8x4(total, sums, to):
    """Four rows by four outputs: pairs (0, 1) and (2, 3), first rows in the low half."""
    store4(sums, to, total, 0)
    store4(sums, to + 2 * BLOCK, total, 1)
    store4(sums, to + BLOCK, total, 2)
    store4(sums, to + 3 * BLOCK, total, 3)


# ---- a group of rows by a block of outputs ---------------------------------------------------------------------

@kernel
def _finish(sums, shards, row, rows, first, last, width, bias, y):
    """y of `rows` rows from `row`: the balanced binary tree over the shards (neighbours first), then the bias."""
    step = 1
    while step < shards:
        for s in range(0, shards, 2 * step):
            for i in range(0, rows * BLOCK, 8):
                a, b = s * STRIDE + i, (s + step) * STRIDE + i
                store8(sums, a, add8(load8(sums, a), load8(sums, b)))
        step *= 2
    for r in range(rows):
        for n in range(first, last, 8):
            value = load8(sums, r * BLOCK + n - first)
            count = min(8, last - n)
            if bias.size:
                value = add8(value, load8n(bias, n, count))
            store8n(y, (row + r) * width + n, value, count)


@kernel
def _row1(x, row, inputs, w, w_row, first, last, bounds, sums):
    """Sums of one row. Row 0 of w is output `w_row`; outputs past the last one repeat it and are dropped."""
    end = (last - 1 - w_row) * inputs
    for n in range(first, last, 8):
        w0 = (n - w_row) * inputs
        w1, w2, w3 = min(w0 + inputs, end), min(w0 + 2 * inputs, end), min(w0 + 3 * inputs, end)
        w4, w5, w6 = min(w0 + 4 * inputs, end), min(w0 + 5 * inputs, end), min(w0 + 6 * inputs, end)
        w7 = min(w0 + 7 * inputs, end)
        for s in range(bounds.size - 1):
            _tile1x8(x, row * inputs, w, w0, w1, w2, w3, w4, w5, w6, w7, bounds[s], bounds[s + 1],
                     sums, s * STRIDE + n - first)


@kernel
def _rows4(x, row, rows, inputs, w, w_row, first, last, bounds, sums):
    """Sums of rows row … row + 3; rows past the last one repeat it and are dropped, as are outputs."""
    x0, end = row * inputs, (rows - 1) * inputs
    x1, x2, x3 = min(x0 + inputs, end), min(x0 + 2 * inputs, end), min(x0 + 3 * inputs, end)
    for s in range(bounds.size - 1):
        for n in range(first, last, 2):
            w0 = (n - w_row) * inputs
            w1 = w0 + inputs if n + 1 < last else w0
            _tile4x2(x, x0, x1, x2, x3, w, w0, w1, bounds[s], bounds[s + 1], sums, s * STRIDE + n - first)


@kernel
def _rows8(packed, x0, inputs, w, w_row, first, last, bounds, sums):
    """Sums of the eight rows at packed[x0]; outputs past the last one repeat it and are dropped."""
    end = (last - 1 - w_row) * inputs
    for s in range(bounds.size - 1):
        start, count = bounds[s], bounds[s + 1] - bounds[s]
        for n in range(first, last, 4):
            w0 = (n - w_row) * inputs
            w1, w2, w3 = min(w0 + inputs, end), min(w0 + 2 * inputs, end), min(w0 + 3 * inputs, end)
            _tile8x4(packed, x0, w, w0 + start, w1 + start, w2 + start, w3 + start, count,
                     sums, s * STRIDE + n - first)
        x0 += (count + 7) // 8 * 8 * GROUP


@kernel
def _few(x, row, rows, inputs, w, w_row, first, last, width, bias, bounds, y, sums):
    """Rows row … rows − 1 by one block of outputs: fours, then a rest of one or two singly."""
    shards = bounds.size - 1
    while rows - row > 2:
        _rows4(x, row, rows, inputs, w, w_row, first, last, bounds, sums)
        _finish(sums, shards, row, min(4, rows - row), first, last, width, bias, y)
        row += 4
    while row < rows:
        _row1(x, row, inputs, w, w_row, first, last, bounds, sums)
        _finish(sums, shards, row, 1, first, last, width, bias, y)
        row += 1


@kernel
def _many(x, row, rows, inputs, packed, depth, w, w_row, first, last, width, bias, bounds, y, sums):
    """The same, of fp32 weights: eights where rows are packed, then the rest."""
    if depth:
        while rows - row >= GROUP:
            _rows8(packed, row * depth, inputs, w, w_row, first, last, bounds, sums)
            _finish(sums, bounds.size - 1, row, GROUP, first, last, width, bias, y)
            row += GROUP
    _few(x, row, rows, inputs, w, w_row, first, last, width, bias, bounds, y, sums)


# ---- the whole product -----------------------------------------------------------------------------------------

@kernel
def _pack(x, row, inputs, bounds, packed, to):
    """Rows row … row + 7 from packed[to]: per eight inputs, four pairs of rows; a shard's tail is filled with 0."""
    for s in range(bounds.size - 1):
        for k in range(bounds[s], bounds[s + 1], 8):
            count = min(8, bounds[s + 1] - k)
            for r in range(GROUP):
                store8(packed, to + 8 * r, load8n(x, (row + r) * inputs + k, count))
            to += 8 * GROUP


@kernel
def _widen(w, start, count, wide):
    """wide[0 … count − 1] = fp32 of w[start …]."""
    whole = count & ~7
    for k in range(0, whole, 8):
        store8(wide, k, load8(w, start + k))
    for k in range(whole, count):
        store1(wide, k, load1(w, start + k))


def packed_size(rows: int, bounds: np.ndarray) -> int:
    """fp32 elements of `packed` that `linear` needs: 0 where rows are not packed."""
    groups = rows // GROUP if WIDE else 0
    return groups * GROUP * int(sum(-(-n // 8) * 8 for n in np.diff(bounds).tolist())) if groups else 0


@kernel
def _pack_all(x, rows, inputs, bounds, packed):
    """Pack all full groups of eight rows; returns how many inputs a packed row has, 0 where none is packed."""
    depth = 0
    if packed.size:
        for s in range(bounds.size - 1):
            depth += (bounds[s + 1] - bounds[s] + 7) // 8 * 8
        for group in range(rows // GROUP):
            _pack(x, group * GROUP, inputs, bounds, packed, group * GROUP * depth)
    return depth


@kernel
def _panels(rows, inputs):
    """(panels, rows in each): x is cut so that a panel stays in the second-level cache while weights pass by."""
    groups, most = (rows + GROUP - 1) // GROUP, max(PANEL // (GROUP * inputs), 1)
    panels = (groups + most - 1) // most
    return panels, (groups + panels - 1) // panels * GROUP if panels else GROUP


@kernel(parallel=True)
def linear32(x, rows, inputs, w, width, bias, bounds, packed, y):
    """y[rows, width] = x[rows, inputs] @ w[width, inputs].T + bias; all contiguous and fp32.

    `bias` is fp32 [width], or empty for none. `bounds` is int64 [V + 1] from 0 to `inputs`. `packed` is workspace of
    `packed_size` elements; where that is 0 no rows are packed.
    """
    depth = _pack_all(x, rows, inputs, bounds, packed)
    blocks = (width + BLOCK - 1) // BLOCK
    panels, panel = _panels(rows, inputs)
    for task in prange(panels * blocks):
        row, first = task // blocks * panel, task % blocks * BLOCK
        stop, last = min(row + panel, rows), min(first + BLOCK, width)
        sums = np.empty(STRIDE * (bounds.size - 1), np.float32)
        _many(pointer(x), row, stop, inputs, pointer(packed), depth, pointer(w), 0, first, last, width, bias, bounds,
              pointer(y), pointer(sums))


@kernel(parallel=True)
def linear16(x, rows, inputs, w, width, bias, bounds, packed, y):
    """`linear32` of bf16 or fp16 weights (see `simd`)."""
    depth = _pack_all(x, rows, inputs, bounds, packed)
    blocks = (width + BLOCK - 1) // BLOCK
    panels, panel = _panels(rows, inputs)
    for task in prange(panels * blocks):
        row, first = task // blocks * panel, task % blocks * BLOCK
        stop, last = min(row + panel, rows), min(first + BLOCK, width)
        sums = np.empty(STRIDE * (bounds.size - 1), np.float32)
        if rows < GROUP:
            _few(pointer(x), row, stop, inputs, pointer(w), 0, first, last, width, bias, bounds, pointer(y),
                 pointer(sums))
        else:
            wide = np.empty((last - first) * inputs, np.float32)
            _widen(pointer(w), first * inputs, wide.size, pointer(wide))
            _many(pointer(x), row, stop, inputs, pointer(packed), depth, pointer(wide), first, first, last, width,
                  bias, bounds, pointer(y), pointer(sums))
