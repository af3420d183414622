"""The tiles of a matrix product: a few sums over K side by side, each in eight lanes of its own.

A tile covers `count` inputs. `first` says that the sums start here, `last` that they end here: in between, where a
long K is cut into chunks that fit the first-level cache, accumulators wait in `carry`, unreduced, so that cutting
changes no bits. At the end each sum is the `hsum8` of its lanes, at sums[to + pitch·row + output].

All arguments are `pointer`s and element offsets. A chunk that is not the last is a multiple of eight inputs.
"""

from __future__ import annotations

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import load8, load8n, narrow, prefetch, store8, store_lanes
from headrace.kernels.cpu.simd import fma8, hsum8x8, zero8
from headrace.kernels.cpu.simd16 import fma16, hsum16x8, load16, store16, store_quarter, twice8, zero16

__all__ = ["tile1x8", "tile4x2", "tile4x3", "tile8x4"]


@kernel
def tile1x8(x, x0, w, w0, w1, w2, w3, w4, w5, w6, w7, count, ahead, sums, to):
    """One row, eight outputs, never cut: it reads every weight once, at the memory's bandwidth.

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
def tile4x2(x, x0, x1, x2, x3, w, w0, w1, count, first, last, carry, c, sums, to, pitch):
    """Four rows, two outputs: eight accumulators keep both FMA units of a 256-bit machine busy."""
    if first:
        a0, a1, a2, a3 = zero8(), zero8(), zero8(), zero8()
        b0, b1, b2, b3 = zero8(), zero8(), zero8(), zero8()
    else:
        a0, a1, a2, a3 = load8(carry, c), load8(carry, c + 8), load8(carry, c + 16), load8(carry, c + 24)
        b0, b1, b2, b3 = load8(carry, c + 32), load8(carry, c + 40), load8(carry, c + 48), load8(carry, c + 56)
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
    if not last:
        store8(carry, c, a0), store8(carry, c + 8, a1), store8(carry, c + 16, a2), store8(carry, c + 24, a3)
        store8(carry, c + 32, b0), store8(carry, c + 40, b1), store8(carry, c + 48, b2), store8(carry, c + 56, b3)
        return
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
def tile4x3(x, x0, x1, x2, x3, w, w0, w1, w2, count, first, last, carry, c, sums, to, pitch):
    """Four rows, three outputs: twelve accumulators hide the latency of an FMA, and need fewer loads each.

    Of each row a fourth element of `sums` is written too: the tile of the outputs from there comes after this one.
    """
    if first:
        a0, a1, a2, a3 = zero8(), zero8(), zero8(), zero8()
        b0, b1, b2, b3 = zero8(), zero8(), zero8(), zero8()
        c0, c1, c2, c3 = zero8(), zero8(), zero8(), zero8()
    else:
        a0, a1, a2, a3 = load8(carry, c), load8(carry, c + 8), load8(carry, c + 16), load8(carry, c + 24)
        b0, b1, b2, b3 = load8(carry, c + 32), load8(carry, c + 40), load8(carry, c + 48), load8(carry, c + 56)
        c0, c1, c2, c3 = load8(carry, c + 64), load8(carry, c + 72), load8(carry, c + 80), load8(carry, c + 88)
    tail = count & 7
    for k in range(0, count - tail, 8):
        t, u, v = load8(w, w0 + k), load8(w, w1 + k), load8(w, w2 + k)
        r = load8(x, x0 + k)
        a0, b0, c0 = fma8(r, t, a0), fma8(r, u, b0), fma8(r, v, c0)
        r = load8(x, x1 + k)
        a1, b1, c1 = fma8(r, t, a1), fma8(r, u, b1), fma8(r, v, c1)
        r = load8(x, x2 + k)
        a2, b2, c2 = fma8(r, t, a2), fma8(r, u, b2), fma8(r, v, c2)
        r = load8(x, x3 + k)
        a3, b3, c3 = fma8(r, t, a3), fma8(r, u, b3), fma8(r, v, c3)
    if not last:
        store8(carry, c, a0), store8(carry, c + 8, a1), store8(carry, c + 16, a2), store8(carry, c + 24, a3)
        store8(carry, c + 32, b0), store8(carry, c + 40, b1), store8(carry, c + 48, b2), store8(carry, c + 56, b3)
        store8(carry, c + 64, c0), store8(carry, c + 72, c1), store8(carry, c + 80, c2), store8(carry, c + 88, c3)
        return
    if tail:
        k = count - tail
        t, u, v = load8n(w, w0 + k, tail), load8n(w, w1 + k, tail), load8n(w, w2 + k, tail)
        r = load8n(x, x0 + k, tail)
        a0, b0, c0 = fma8(r, t, a0), fma8(r, u, b0), fma8(r, v, c0)
        r = load8n(x, x1 + k, tail)
        a1, b1, c1 = fma8(r, t, a1), fma8(r, u, b1), fma8(r, v, c1)
        r = load8n(x, x2 + k, tail)
        a2, b2, c2 = fma8(r, t, a2), fma8(r, u, b2), fma8(r, v, c2)
        r = load8n(x, x3 + k, tail)
        a3, b3, c3 = fma8(r, t, a3), fma8(r, u, b3), fma8(r, v, c3)
    total = hsum8x8(a0, b0, c0, c0, a1, b1, c1, c1)
    store_lanes(sums, to, total, 0, 4), store_lanes(sums, to + pitch, total, 4, 4)
    total = hsum8x8(a2, b2, c2, c2, a3, b3, c3, c3)
    store_lanes(sums, to + 2 * pitch, total, 0, 4), store_lanes(sums, to + 3 * pitch, total, 4, 4)


@kernel
def _carried(carry, c):
    return load16(carry, c), load16(carry, c + 16), load16(carry, c + 32), load16(carry, c + 48)


@kernel
def _carry(carry, c, a0, a1, a2, a3):
    store16(carry, c, a0), store16(carry, c + 16, a1), store16(carry, c + 32, a2), store16(carry, c + 48, a3)


@kernel
def _prefetch(far, at):
    """Prefetch what eight inputs of up to four streams span: one line, or two of fp32."""
    prefetch(far, at)
    if not narrow(far):
        prefetch(far, at + 16)


@kernel
def tile8x4(x, x0, w, w0, w1, w2, w3, count, first, last, carry, c, sums, to, pitch, far, ask, stride, streams):
    """Eight rows, four outputs, for AVX-512: sixteen accumulators of two rows each.

    x is packed: for every eight inputs, eight rows of eight elements, a tail filled with 0. Meanwhile `count` elements
    from each of far[ask], far[ask + stride], … (as many as `streams`) are prefetched, a line at a time: a burst of
    requests would delay the tile's own loads.
    """
    if first:
        a0, a1, a2, a3 = zero16(), zero16(), zero16(), zero16()
        b0, b1, b2, b3 = zero16(), zero16(), zero16(), zero16()
        c0, c1, c2, c3 = zero16(), zero16(), zero16(), zero16()
        d0, d1, d2, d3 = zero16(), zero16(), zero16(), zero16()
    else:
        a0, a1, a2, a3 = _carried(carry, c)
        b0, b1, b2, b3 = _carried(carry, c + 64)
        c0, c1, c2, c3 = _carried(carry, c + 128)
        d0, d1, d2, d3 = _carried(carry, c + 192)
    tail = count & 7
    whole, stretch = count - tail, (count // max(streams, 1)) & ~7
    for stream in range(max(streams, 1)):
        start = stream * stretch
        stop = start + stretch if stream + 1 < streams else whole
        for k in range(start, stop, 8):
            _prefetch(far, ask + stream * stride + (k - start) * streams)
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
    if not last:
        _carry(carry, c, a0, a1, a2, a3)
        _carry(carry, c + 64, b0, b1, b2, b3)
        _carry(carry, c + 128, c0, c1, c2, c3)
        _carry(carry, c + 192, d0, d1, d2, d3)
        return
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
