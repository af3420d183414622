"""The products behind a linear's gradients: sums over tokens or over outputs, one order for every shape and thread.

    C[m, n] = Σ_s A(m, s) · B[s, n]        A(m, s) at a[m·row + s·step], B in any dtype

Vectors lie along n, so nothing is ever summed across lanes. The s are given as spans, runs of a virtual shard: a span
is cut into chunks of `DEPTH` from its start; an element of a chunk is a chain of FMAs from 0, s ascending; a shard's
chunks are added in order to 0, and the shards in a balanced tree. How outputs are cut into tasks, blocks and tiles
changes no sum, and neither does the width of the registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from headrace.kernels.cpu.launch import WIDE, kernel
from headrace.kernels.cpu.memory import load1, load8, load8n, pointer, prefetch, store8, store8n
from headrace.kernels.cpu.simd16 import add16, fma16, high8, load16, low8, splat16, store16, zero16
from headrace.kernels.cpu.work import scratch, take

__all__ = ["COLUMNS", "DEPTH", "HEIGHT", "PANEL", "ROWS", "Ahead", "Tiles", "chunk", "pack", "product", "product_part"]

DEPTH = 256
"""Terms of one chain."""

HEIGHT = 8 if WIDE else 6  # rows of a tile
PANEL = 32 if WIDE else 16  # columns of a tile
ROWS = 32 * HEIGHT  # most rows of a block: its chunk of A stays in the second-level cache
COLUMNS = 512  # of a block


@kernel
def _add(c, to, sums, first):
    store16(c, to, sums if first else add16(load16(c, to), sums))


@kernel
def _prefetch8(far, at, apart):
    """Prefetch eight lines."""
    prefetch(far, at), prefetch(far, at + apart), prefetch(far, at + 2 * apart), prefetch(far, at + 3 * apart)
    at += 4 * apart
    prefetch(far, at), prefetch(far, at + apart), prefetch(far, at + 2 * apart), prefetch(far, at + 3 * apart)


@kernel
def _tile8x32(a, r0, r1, r2, r3, r4, r5, r6, r7, step, b, at, depth, first, c, to, pitch, far, ask, further, apart):
    """c[8, 32] at `to` = (after the first chunk: +=) the chains of `depth` terms from b[at], sixteen for AVX-512.

    Every sixteen terms, eight lines of `far` are prefetched, `apart` from each other, from `ask` on, then `further` on.
    """
    a0, a1, a2, a3 = zero16(), zero16(), zero16(), zero16()
    a4, a5, a6, a7 = zero16(), zero16(), zero16(), zero16()
    b0, b1, b2, b3 = zero16(), zero16(), zero16(), zero16()
    b4, b5, b6, b7 = zero16(), zero16(), zero16(), zero16()
    s, end = 0, at + depth * 32
    for start in range(at, end, 512):
        _prefetch8(far, ask, apart)
        ask += further
        for k in range(start, min(start + 512, end), 32):
            u, v = load16(b, k), load16(b, k + 16)
            w = splat16(load1(a, r0 + s))
            a0, b0 = fma16(w, u, a0), fma16(w, v, b0)
            w = splat16(load1(a, r1 + s))
            a1, b1 = fma16(w, u, a1), fma16(w, v, b1)
            w = splat16(load1(a, r2 + s))
            a2, b2 = fma16(w, u, a2), fma16(w, v, b2)
            w = splat16(load1(a, r3 + s))
            a3, b3 = fma16(w, u, a3), fma16(w, v, b3)
            w = splat16(load1(a, r4 + s))
            a4, b4 = fma16(w, u, a4), fma16(w, v, b4)
            w = splat16(load1(a, r5 + s))
            a5, b5 = fma16(w, u, a5), fma16(w, v, b5)
            w = splat16(load1(a, r6 + s))
            a6, b6 = fma16(w, u, a6), fma16(w, v, b6)
            w = splat16(load1(a, r7 + s))
            a7, b7 = fma16(w, u, a7), fma16(w, v, b7)
            s += step
    _add(c, to, a0, first), _add(c, to + 16, b0, first)
    _add(c, to + pitch, a1, first), _add(c, to + pitch + 16, b1, first)
    to += 2 * pitch
    _add(c, to, a2, first), _add(c, to + 16, b2, first)
    _add(c, to + pitch, a3, first), _add(c, to + pitch + 16, b3, first)
    to += 2 * pitch
    _add(c, to, a4, first), _add(c, to + 16, b4, first)
    _add(c, to + pitch, a5, first), _add(c, to + pitch + 16, b5, first)
    to += 2 * pitch
    _add(c, to, a6, first), _add(c, to + 16, b6, first)
    _add(c, to + pitch, a7, first), _add(c, to + pitch + 16, b7, first)


@kernel
def _tile6x16(a, r0, r1, r2, r3, r4, r5, step, b, at, depth, first, c, to, pitch, far, ask, further, apart):
    """The same of 6 × 16: twelve accumulators of 256 bits."""
    a0, a1, a2, a3, a4, a5 = zero16(), zero16(), zero16(), zero16(), zero16(), zero16()
    s, end = 0, at + depth * 16
    for start in range(at, end, 256):
        _prefetch8(far, ask, apart)
        ask += further
        for k in range(start, min(start + 256, end), 16):
            u = load16(b, k)
            a0 = fma16(splat16(load1(a, r0 + s)), u, a0)
            a1 = fma16(splat16(load1(a, r1 + s)), u, a1)
            a2 = fma16(splat16(load1(a, r2 + s)), u, a2)
            a3 = fma16(splat16(load1(a, r3 + s)), u, a3)
            a4 = fma16(splat16(load1(a, r4 + s)), u, a4)
            a5 = fma16(splat16(load1(a, r5 + s)), u, a5)
            s += step
    _add(c, to, a0, first), _add(c, to + pitch, a1, first), _add(c, to + 2 * pitch, a2, first)
    to += 3 * pitch
    _add(c, to, a3, first), _add(c, to + pitch, a4, first), _add(c, to + 2 * pitch, a5, first)


# ---- chunks of terms -------------------------------------------------------------------------------------------


@kernel
def pack(b, at, pitch, depth, width, room, to):
    """room[to …] = `depth` rows of `width` columns from b[at], in fp32, panel by panel; a last one is filled with 0."""
    for n in range(0, width, PANEL):
        for k in range(at + n, at + n + depth * pitch, pitch):
            if n + PANEL <= width:
                for i in range(0, PANEL, 16):
                    store16(room, to + i, load16(b, k + i))
            else:
                for i in range(0, PANEL, 8):
                    store8(room, to + i, load8n(b, k + i, min(8, max(0, width - n - i))))
            to += PANEL


@kernel
def _pack_rows(a, at, rows, step, depth, room, to):
    """The same of A, in tiles, where its rows lie side by side and terms far apart. Returns how many rows it wrote."""
    tiles, pairs = (rows + HEIGHT - 1) // HEIGHT, rows // 16 * 2 if HEIGHT == 8 else 0
    for s in range(depth):
        for j in range(0, pairs, 2):
            both, first = load16(a, at + s * step + j * 8), to + j * (depth * 8 + 16) + s * 8
            store8(room, first, low8(both)), store8(room, first + depth * 8 + 16, high8(both))
        for j in range(pairs, tiles):
            value = load8n(a, at + s * step + j * HEIGHT, min(HEIGHT, rows - j * HEIGHT))
            store8(room, to + j * (depth * 8 + 16) + s * 8, value)
    return tiles * HEIGHT


class Tiles(NamedTuple):
    """Where tiles of A are: row r of tile j from a[at + j·tile + r·row], each term `step` further."""

    a: Any
    at: int
    tile: int
    row: int
    step: int


class Ahead(NamedTuple):
    """What tile j prefetches before every sixteen terms: eight lines `apart` from a[at + j·tile], then `step` on."""

    a: Any
    at: int
    tile: int
    step: int
    apart: int


@kernel
def chunk(tiles, rows, room, packed, tall, depth, width, first, c, pitch, ask):
    """c[rows, width] gets the chains of one chunk; a panel of B is `tall` rows of which `depth` count.

    Rows past the end repeat the last; c has room for them.
    """
    a, row, step, src, on = tiles.a, tiles.row, tiles.step, ask.a, ask.step
    for n in range(0, width, PANEL):
        b = packed + n * tall
        for j in range((rows + HEIGHT - 1) // HEIGHT):
            r0, to = tiles.at + j * tiles.tile, c + j * HEIGHT * pitch + n
            last = r0 + (min(rows - j * HEIGHT, HEIGHT) - 1) * row
            r1, r2, r3 = min(r0 + row, last), min(r0 + 2 * row, last), min(r0 + 3 * row, last)
            r4, r5 = min(r0 + 4 * row, last), min(r0 + 5 * row, last)
            # The first panel prefetches the next data into the second-level cache, for all panels.
            apart, far = (ask.apart, ask.at + j * ask.tile) if n == 0 else (0, ask.at)
            if WIDE:
                r6, r7 = min(r0 + 6 * row, last), min(r0 + 7 * row, last)
                _tile8x32(
                    a, r0, r1, r2, r3, r4, r5, r6, r7, step, room, b, depth, first, room, to, pitch, src, far, on, apart
                )
            else:
                _tile6x16(a, r0, r1, r2, r3, r4, r5, step, room, b, depth, first, room, to, pitch, src, far, on, apart)


@kernel
def _block(a, at, rows, row, step, b, left, inputs, width, spans, adds, room, packed, sums, slab, pitch):
    """room[sums …]: the sums of columns left … left + width − 1. Shards fall together like a binary counter.

    With `adds` there is one shard, whose first chunk is added to what is there.
    """
    top, i, tiles = sums, 0, packed + DEPTH * pitch
    for shard in range(spans[len(spans) - 1, 0] + 1):
        first = not adds
        while i < len(spans) and spans[i, 0] == shard:
            s, k, count = spans[i, 1], spans[i, 2], spans[i, 3]
            for done in range(0, count, DEPTH):
                depth, start = min(DEPTH, count - done), at + (s + done) * step
                pack(b, (k + done) * inputs + left, inputs, depth, width, room, packed)
                if row == 1:
                    whole = _pack_rows(a, start, rows, step, depth, room, tiles)
                    chunk(
                        Tiles(room, tiles, depth * 8 + 16, 1, 8),
                        whole,
                        room,
                        packed,
                        depth,
                        depth,
                        width,
                        first,
                        top,
                        pitch,
                        Ahead(a, start + depth * step, 16 * step, step, 16),
                    )
                else:
                    chunk(
                        Tiles(a, start, HEIGHT * row, row, step),
                        rows,
                        room,
                        packed,
                        depth,
                        depth,
                        width,
                        first,
                        top,
                        pitch,
                        Ahead(a, start + HEIGHT * row, HEIGHT * row, 16, row),
                    )
                first = False
            i += 1
        if first:  # an empty shard
            for j in range(top, top + slab, 16):
                store16(room, j, zero16())
        while shard & 1:
            top -= slab
            for j in range(top, top + slab, 16):
                store16(room, j, add16(load16(room, j), load16(room, slab + j)))
            shard >>= 1
        top += slab


@kernel
def _read(out, at, inputs, rows, width, room, sums, pitch):
    """room[sums …] = out[rows, width] at `at`."""
    for m in range(rows):
        for n in range(0, width, 8):
            store8(room, sums + m * pitch + n, load8n(out, at + m * inputs + n, min(8, width - n)))


@kernel
def _write(room, sums, pitch, rows, width, out, at, inputs):
    """The way back."""
    for m in range(rows):
        for n in range(0, width, 8):
            store8n(out, at + m * inputs + n, load8(room, sums + m * pitch + n), min(8, width - n))


@kernel
def product_part(a, rows, row, step, b, inputs, spans, out, adds, height, counter):
    """One thread of `product`: takes tasks of `height` rows by `COLUMNS` columns until none is left."""
    levels, shards = 1, spans[len(spans) - 1, 0] + 1
    while shards >> levels:
        levels += 1
    pitch = min(COLUMNS, (inputs + PANEL - 1) // PANEL * PANEL)
    slab = (height + HEIGHT - 1) // HEIGHT * HEIGHT * pitch
    room, start = scratch(levels * slab + DEPTH * pitch + (8 * DEPTH + 16) * ((height + HEIGHT - 1) // HEIGHT))
    sums, packed = start, start + levels * slab
    across = (inputs + COLUMNS - 1) // COLUMNS
    tasks, task = (rows + height - 1) // height * across, take(counter)
    while task < tasks:
        m, n = task // across * height, task % across * COLUMNS
        count, width = min(height, rows - m), min(COLUMNS, inputs - n)
        if adds:
            _read(pointer(out), m * inputs + n, inputs, count, width, pointer(room), sums, pitch)
        _block(
            pointer(a),
            m * row,
            count,
            row,
            step,
            pointer(b),
            n,
            inputs,
            width,
            spans,
            adds,
            pointer(room),
            packed,
            sums,
            slab,
            pitch,
        )
        _write(pointer(room), sums, pitch, count, width, pointer(out), m * inputs + n, inputs)
        task = take(counter)


@kernel(parallel=True)
def product(a, rows, row, step, b, inputs, spans, out, adds, height, workers):
    """out[rows, inputs] = Σ_s A(m, s) · b[s, inputs], or, of one shard, += where `adds`; all fp32 but b any dtype.

    spans, int64 [·, 4]: (shard, first s of A, first row of b, how many), shards ascending from 0, none left out, a
    power of two of them. A thread takes `height` rows at a time.
    """
    counter = np.zeros(1, np.int64)
    for _ in prange(workers):
        product_part(a, rows, row, step, b, inputs, spans, out, adds, height, counter)
