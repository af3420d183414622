"""Tiles of dot products, for attention's scores: a few sums over a head's elements, each in eight lanes of its own.

A sum is the `hsum8` of its lanes, lane i of elements i, i + 8, …, and is stored at sums[to + pitch·row + key]. All
arguments are `pointer`s and element offsets.
"""

from __future__ import annotations

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import load8, load8n, narrow, prefetch, store8, store_lanes
from headrace.kernels.cpu.simd import fma8, hsum8x8, zero8
from headrace.kernels.cpu.simd16 import fma16, hsum16x8, load16, store_quarter, twice8, zero16

__all__ = ["tile1x8", "tile4x2", "tile8x4"]


@kernel
def tile1x8(x, x0, w, w0, w1, w2, w3, w4, w5, w6, w7, count, ahead, sums, to):
    """One row, eight keys, each read once.

    Eight short streams are too many for the hardware to predict, so eight times `count` elements from w[ahead] are
    prefetched meanwhile.
    """
    a0, a1, a2, a3 = zero8(), zero8(), zero8(), zero8()
    a4, a5, a6, a7 = zero8(), zero8(), zero8(), zero8()
    tail = count & 7
    for k in range(0, count - tail, 8):
        prefetch(w, ahead + 8 * k), prefetch(w, ahead + 8 * k + 32)
        if not narrow(w):
            prefetch(w, ahead + 8 * k + 16), prefetch(w, ahead + 8 * k + 48)
        r = load8(x, x0 + k)
        a0, a1 = fma8(r, load8(w, w0 + k), a0), fma8(r, load8(w, w1 + k), a1)
        a2, a3 = fma8(r, load8(w, w2 + k), a2), fma8(r, load8(w, w3 + k), a3)
        a4, a5 = fma8(r, load8(w, w4 + k), a4), fma8(r, load8(w, w5 + k), a5)
        a6, a7 = fma8(r, load8(w, w6 + k), a6), fma8(r, load8(w, w7 + k), a7)
    if tail:
        k = count - tail
        r = load8n(x, x0 + k, tail)
        a0, a1 = fma8(r, load8n(w, w0 + k, tail), a0), fma8(r, load8n(w, w1 + k, tail), a1)
        a2, a3 = fma8(r, load8n(w, w2 + k, tail), a2), fma8(r, load8n(w, w3 + k, tail), a3)
        a4, a5 = fma8(r, load8n(w, w4 + k, tail), a4), fma8(r, load8n(w, w5 + k, tail), a5)
        a6, a7 = fma8(r, load8n(w, w6 + k, tail), a6), fma8(r, load8n(w, w7 + k, tail), a7)
    store8(sums, to, hsum8x8(a0, a1, a2, a3, a4, a5, a6, a7))


@kernel
def tile4x2(x, x0, x1, x2, x3, w, w0, w1, count, sums, to, pitch):
    """Four rows, two keys: eight accumulators keep both FMA units of a 256-bit machine busy."""
    a0, a1, a2, a3 = zero8(), zero8(), zero8(), zero8()
    b0, b1, b2, b3 = zero8(), zero8(), zero8(), zero8()
    tail = count & 7
    for k in range(0, count - tail, 8):
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
        k = count - tail
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
    store_lanes(sums, to, total, 0, 2), store_lanes(sums, to + pitch, total, 2, 2)
    store_lanes(sums, to + 2 * pitch, total, 4, 2), store_lanes(sums, to + 3 * pitch, total, 6, 2)


@kernel
def tile8x4(x, x0, w, w0, w1, w2, w3, count, sums, to, pitch):
    """Eight rows, four keys, for AVX-512: sixteen accumulators of two rows each.

    x is packed: for every eight elements, eight rows of eight, a tail filled with 0.
    """
    a0, a1, a2, a3 = zero16(), zero16(), zero16(), zero16()
    b0, b1, b2, b3 = zero16(), zero16(), zero16(), zero16()
    c0, c1, c2, c3 = zero16(), zero16(), zero16(), zero16()
    d0, d1, d2, d3 = zero16(), zero16(), zero16(), zero16()
    tail = count & 7
    for k in range(0, count - tail, 8):
        p = x0 + 8 * k
        r0, r1, r2, r3 = load16(x, p), load16(x, p + 16), load16(x, p + 32), load16(x, p + 48)
        u = twice8(load8(w, w0 + k))
        a0, a1, a2, a3 = fma16(r0, u, a0), fma16(r1, u, a1), fma16(r2, u, a2), fma16(r3, u, a3)
        u = twice8(load8(w, w1 + k))
        b0, b1, b2, b3 = fma16(r0, u, b0), fma16(r1, u, b1), fma16(r2, u, b2), fma16(r3, u, b3)
        u = twice8(load8(w, w2 + k))
        c0, c1, c2, c3 = fma16(r0, u, c0), fma16(r1, u, c1), fma16(r2, u, c2), fma16(r3, u, c3)
        u = twice8(load8(w, w3 + k))
        d0, d1, d2, d3 = fma16(r0, u, d0), fma16(r1, u, d1), fma16(r2, u, d2), fma16(r3, u, d3)
    if tail:
        k = count - tail
        p = x0 + 8 * k
        r0, r1, r2, r3 = load16(x, p), load16(x, p + 16), load16(x, p + 32), load16(x, p + 48)
        u = twice8(load8n(w, w0 + k, tail))
        a0, a1, a2, a3 = fma16(r0, u, a0), fma16(r1, u, a1), fma16(r2, u, a2), fma16(r3, u, a3)
        u = twice8(load8n(w, w1 + k, tail))
        b0, b1, b2, b3 = fma16(r0, u, b0), fma16(r1, u, b1), fma16(r2, u, b2), fma16(r3, u, b3)
        u = twice8(load8n(w, w2 + k, tail))
        c0, c1, c2, c3 = fma16(r0, u, c0), fma16(r1, u, c1), fma16(r2, u, c2), fma16(r3, u, c3)
        u = twice8(load8n(w, w3 + k, tail))
        d0, d1, d2, d3 = fma16(r0, u, d0), fma16(r1, u, d1), fma16(r2, u, d2), fma16(r3, u, d3)
    total = hsum16x8(a0, b0, c0, d0, a1, b1, c1, d1)  # rows 0, 2 | 1, 3
    store_quarter(sums, to, total, 0), store_quarter(sums, to + 2 * pitch, total, 1)
    store_quarter(sums, to + pitch, total, 2), store_quarter(sums, to + 3 * pitch, total, 3)
    total = hsum16x8(a2, b2, c2, d2, a3, b3, c3, d3)  # rows 4, 6 | 5, 7
    to += 4 * pitch
    store_quarter(sums, to, total, 0), store_quarter(sums, to + 2 * pitch, total, 1)
    store_quarter(sums, to + pitch, total, 2), store_quarter(sums, to + 3 * pitch, total, 3)
