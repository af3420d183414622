"""One split's partial of paged attention: the sums over keys, straight from the block table.

Scores, softmax weights and weighted values of one row, or of four or eight that share every read of K and V. A score
is a tile's sum in eight lanes (see `dots`). All heights make the same sums in the
same order (see `attention.py` for the law), so a row's bits do not depend on its neighbours. Positions are absolute;
`blocks`, queries and `scratch` are addressed by element offsets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from headrace.kernels.cpu.dots import tile1x8, tile4x2, tile8x4
from headrace.kernels.cpu.launch import WIDE, kernel
from headrace.kernels.cpu.memory import load1, load8, load8n, narrow, pointer, prefetch, store1, store8
from headrace.kernels.cpu.simd import add8, fma8, hmax8, hsum8, max8, splat8, zero8
from headrace.kernels.cpu.simd16 import (
    exp16,
    fma16,
    high8,
    load16,
    low8,
    max16,
    mul16,
    splat16,
    store16,
    sub16,
)
from headrace.kernels.partials import SPLIT

__all__ = ["NODES", "ROWS", "Paged", "locate", "partial"]

ROWS = 8 if WIDE else 4
AHEAD = 16
"""How many keys ahead a key is prefetched: blocks lie anywhere, so the hardware cannot predict the next one."""

PITCH = SPLIT + 16
"""Scores of a row in scratch, position j at j mod 256; the last tile may write past the split."""

NODES = ROWS * PITCH
"""Scratch offset of the partials being built."""

NEVER = np.float32(-np.inf)


class Paged(NamedTuple):
    """One sequence's keys and values of one layer and kv head, inside the flat cache."""

    blocks: Any
    table_M: Any
    block_stride: int
    keys: int
    values: int
    """Elements from a key to its value."""
    shift: int
    """log2 of the block size."""
    dim: int
    at_K: Any
    """Element offset of the key at position j of the split being read, at j mod 256: see `locate`."""


@kernel
def locate(paged, first, last):
    """Look the keys of positions first … last − 1, which lie in one split, up in the block table."""
    for j in range(first, last):
        block = np.int64(paged.table_M[j >> paged.shift])
        within = (j & ((1 << paged.shift) - 1)) * paged.dim
        paged.at_K[j & (SPLIT - 1)] = block * paged.block_stride + paged.keys + within


@kernel
def _key(paged, position):
    return paged.at_K[position & (SPLIT - 1)]


@kernel
def _prefetch(kv, offset, count):
    """Prefetch `count` elements."""
    for i in range(0, count, 32 if narrow(kv) else 16):
        prefetch(kv, offset + i)


@kernel
def _prefetch_both(kv, paged, position, count, last):
    """Prefetch the values of `count` positions, and the keys of those that come AHEAD of them."""
    _prefetch(kv, _key(paged, min(position + AHEAD, last - 1)), count * paged.dim)
    _prefetch(kv, _key(paged, position) + paged.values, count * paged.dim)


# ---- scores: keys past the end of a tile repeat the last one; what they write is masked later -------------------


@kernel
def _scores8(packed, kv, paged, first, last, fresh, scratch):
    """Of eight rows: see `tile8x4` for the order in which they are packed."""
    for j in range(first, last, 4):
        if fresh:
            _prefetch_both(kv, paged, j, 4, last)
        k0, k1 = _key(paged, j), _key(paged, min(j + 1, last - 1))
        k2, k3 = _key(paged, min(j + 2, last - 1)), _key(paged, min(j + 3, last - 1))
        tile8x4(packed, 0, kv, k0, k1, k2, k3, paged.dim, scratch, j & (SPLIT - 1), PITCH)


@kernel
def _scores4(q, q0, q1, q2, q3, kv, paged, first, last, fresh, scratch):
    """Of four rows."""
    for j in range(first, last, 2):
        if fresh:
            _prefetch_both(kv, paged, j, 2, last)
        k0, k1 = _key(paged, j), _key(paged, min(j + 1, last - 1))
        tile4x2(q, q0, q1, q2, q3, kv, k0, k1, paged.dim, scratch, j & (SPLIT - 1), PITCH)


@kernel
def _scores1(q, q0, kv, paged, first, last, scratch):
    """Of one row, which is always the first to read these keys. The tile prefetches keys, a line at a time."""
    end = last - 1
    for j in range(first, last, 8):
        k0, k1, k2 = _key(paged, j), _key(paged, min(j + 1, end)), _key(paged, min(j + 2, end))
        k3, k4, k5 = _key(paged, min(j + 3, end)), _key(paged, min(j + 4, end)), _key(paged, min(j + 5, end))
        k6, k7, ahead = _key(paged, min(j + 6, end)), _key(paged, min(j + 7, end)), _key(paged, min(j + AHEAD, end))
        _prefetch(kv, k0 + paged.values, 8 * paged.dim)
        tile1x8(q, q0, kv, k0, k1, k2, k3, k4, k5, k6, k7, paged.dim, ahead, scratch, j & (SPLIT - 1))


# ---- softmax weights -------------------------------------------------------------------------------------------


@kernel
def _weights(scratch, at, low, high, first, last, scale, to, node):
    """A row's scores, at scratch[at + j], to weights in place; m and e go to its node at scratch[to].

    low and high are multiples of 16; scores of [low, high) outside the row's own [first, last) count as -inf.
    """
    for j in range(low, min(first, high)):
        store1(scratch, at + j, NEVER)
    for j in range(max(last, low), high):
        store1(scratch, at + j, NEVER)
    by = splat16(scale)
    best = mul16(load16(scratch, at + low), by)
    for j in range(low + 16, high, 16):
        best = max16(mul16(load16(scratch, at + j), by), best)
    m = hmax8(max8(low8(best), high8(best)))
    best = splat16(m)
    total = zero8()
    for j in range(low, high, 16):
        w = exp16(sub16(mul16(load16(scratch, at + j), by), best))
        store16(scratch, at + j, w)
        total = add8(add8(total, low8(w)), high8(w))
    store1(scratch, to + node - 2, m)
    store1(scratch, to + node - 1, hsum8(total))


# ---- weighted values -------------------------------------------------------------------------------------------


@kernel
def _values8(kv, paged, first, last, scratch, node):
    """MA of eight rows, 32 elements of the head dimension at a time: + p_j · v_j for j = first … last − 1."""
    dim = paged.dim
    for c in range(0, dim & ~31, 32):
        n0 = NODES + c
        n1, n2, n3 = n0 + node, n0 + 2 * node, n0 + 3 * node
        n4, n5, n6, n7 = n0 + 4 * node, n0 + 5 * node, n0 + 6 * node, n0 + 7 * node
        a0, a1, a2, a3 = load16(scratch, n0), load16(scratch, n1), load16(scratch, n2), load16(scratch, n3)
        a4, a5, a6, a7 = load16(scratch, n4), load16(scratch, n5), load16(scratch, n6), load16(scratch, n7)
        b0, b1 = load16(scratch, n0 + 16), load16(scratch, n1 + 16)
        b2, b3 = load16(scratch, n2 + 16), load16(scratch, n3 + 16)
        b4, b5 = load16(scratch, n4 + 16), load16(scratch, n5 + 16)
        b6, b7 = load16(scratch, n6 + 16), load16(scratch, n7 + 16)
        for j in range(first, last):
            v, p = _key(paged, j) + paged.values + c, j & (SPLIT - 1)
            va, vb = load16(kv, v), load16(kv, v + 16)
            w = splat16(load1(scratch, p))
            a0, b0 = fma16(w, va, a0), fma16(w, vb, b0)
            w = splat16(load1(scratch, p + PITCH))
            a1, b1 = fma16(w, va, a1), fma16(w, vb, b1)
            w = splat16(load1(scratch, p + 2 * PITCH))
            a2, b2 = fma16(w, va, a2), fma16(w, vb, b2)
            w = splat16(load1(scratch, p + 3 * PITCH))
            a3, b3 = fma16(w, va, a3), fma16(w, vb, b3)
            w = splat16(load1(scratch, p + 4 * PITCH))
            a4, b4 = fma16(w, va, a4), fma16(w, vb, b4)
            w = splat16(load1(scratch, p + 5 * PITCH))
            a5, b5 = fma16(w, va, a5), fma16(w, vb, b5)
            w = splat16(load1(scratch, p + 6 * PITCH))
            a6, b6 = fma16(w, va, a6), fma16(w, vb, b6)
            w = splat16(load1(scratch, p + 7 * PITCH))
            a7, b7 = fma16(w, va, a7), fma16(w, vb, b7)
        store16(scratch, n0, a0), store16(scratch, n1, a1), store16(scratch, n2, a2), store16(scratch, n3, a3)
        store16(scratch, n4, a4), store16(scratch, n5, a5), store16(scratch, n6, a6), store16(scratch, n7, a7)
        store16(scratch, n0 + 16, b0), store16(scratch, n1 + 16, b1)
        store16(scratch, n2 + 16, b2), store16(scratch, n3 + 16, b3)
        store16(scratch, n4 + 16, b4), store16(scratch, n5 + 16, b5)
        store16(scratch, n6 + 16, b6), store16(scratch, n7 + 16, b7)
    for row in range(8):
        for c in range(dim & ~31, dim, 8):
            _values_vector(kv, paged, first, last, scratch, row * PITCH, NODES + row * node, c)


@kernel
def _values4(kv, paged, first, last, scratch, node):
    """MA of four rows, sixteen elements at a time."""
    dim = paged.dim
    for c in range(0, dim & ~15, 16):
        n0 = NODES + c
        n1, n2, n3 = n0 + node, n0 + 2 * node, n0 + 3 * node
        a0, b0, a1, b1 = load8(scratch, n0), load8(scratch, n0 + 8), load8(scratch, n1), load8(scratch, n1 + 8)
        a2, b2, a3, b3 = load8(scratch, n2), load8(scratch, n2 + 8), load8(scratch, n3), load8(scratch, n3 + 8)
        for j in range(first, last):
            v, p = _key(paged, j) + paged.values + c, j & (SPLIT - 1)
            va, vb = load8(kv, v), load8(kv, v + 8)
            w = splat8(load1(scratch, p))
            a0, b0 = fma8(w, va, a0), fma8(w, vb, b0)
            w = splat8(load1(scratch, p + PITCH))
            a1, b1 = fma8(w, va, a1), fma8(w, vb, b1)
            w = splat8(load1(scratch, p + 2 * PITCH))
            a2, b2 = fma8(w, va, a2), fma8(w, vb, b2)
            w = splat8(load1(scratch, p + 3 * PITCH))
            a3, b3 = fma8(w, va, a3), fma8(w, vb, b3)
        store8(scratch, n0, a0), store8(scratch, n0 + 8, b0), store8(scratch, n1, a1), store8(scratch, n1 + 8, b1)
        store8(scratch, n2, a2), store8(scratch, n2 + 8, b2), store8(scratch, n3, a3), store8(scratch, n3 + 8, b3)
    for row in range(4):
        for c in range(dim & ~15, dim, 8):
            _values_vector(kv, paged, first, last, scratch, row * PITCH, NODES + row * node, c)


@kernel
def _values1(kv, paged, first, last, scratch, weights, at):
    """MA of one row, whose weights are at scratch[weights + j mod 256] and whose node is at `at`."""
    dim = paged.dim
    for c in range(0, dim & ~31, 32):
        a0, a1 = load8(scratch, at + c), load8(scratch, at + c + 8)
        a2, a3 = load8(scratch, at + c + 16), load8(scratch, at + c + 24)
        for j in range(first, last):
            v, p = _key(paged, j) + paged.values + c, weights + (j & (SPLIT - 1))
            w = splat8(load1(scratch, p))
            a0, a1 = fma8(w, load8(kv, v), a0), fma8(w, load8(kv, v + 8), a1)
            a2, a3 = fma8(w, load8(kv, v + 16), a2), fma8(w, load8(kv, v + 24), a3)
        store8(scratch, at + c, a0), store8(scratch, at + c + 8, a1)
        store8(scratch, at + c + 16, a2), store8(scratch, at + c + 24, a3)
    for c in range(dim & ~31, dim, 8):
        _values_vector(kv, paged, first, last, scratch, weights, at, c)


@kernel
def _values_vector(kv, paged, first, last, scratch, weights, at, c):
    """MA[c : c + 8] of one row; the last vector may be short."""
    width = min(8, paged.dim - c)
    total = load8(scratch, at + c)
    for j in range(first, last):
        w = splat8(load1(scratch, weights + (j & (SPLIT - 1))))
        total = fma8(w, load8n(kv, _key(paged, j) + paged.values + c, width), total)
    store8(scratch, at + c, total)


# ---- the partial -----------------------------------------------------------------------------------------------


@kernel
def seen(position, split, window):
    """[first, last) of the split's positions that the row at `position` sees; empty when first ≥ last."""
    oldest = max(0, position - window + 1) if window else 0
    return max(split * SPLIT, oldest), min((split + 1) * SPLIT, position + 1)


@kernel
def _pack(q, rows, dim, packed):
    """Eight rows as `tile8x4` reads them: for every eight elements, eight rows of eight, a tail filled with 0."""
    for c in range(0, dim, 8):
        for r in range(8):
            store8(packed, (c + r) * 8, load8n(q, rows[r] + c, min(8, dim - c)))


@kernel
def partial(q_THd, rows, position, count, paged, split, window, fresh, scale, room, packed_8d, node):
    """Partials of one split for up to ROWS rows, left in the nodes at room[NODES + r·node]: MA, then m and e.

    `rows[r]` is the element offset of row r's query and `position[r]` its position, ascending; unused entries
    repeat the last row; `locate` has found what they see. Rows that see nothing of the split get a node without
    meaning.
    """
    q, kv, scratch = pointer(q_THd), pointer(paged.blocks), pointer(room)
    for at in range(NODES, NODES + ROWS * node, 8):
        store8(scratch, at, zero8())
    start = split * SPLIT
    outer_first, inner_last = seen(position[0], split, window)
    inner_first, outer_last = seen(position[ROWS - 1], split, window)
    low, high = (outer_first - start) & ~15, ((outer_last - 1 - start) & ~15) + 16
    if count == 1:
        _scores1(q, rows[0], kv, paged, outer_first, outer_last, scratch)
    elif count <= 4:
        _scores4(q, rows[0], rows[1], rows[2], rows[3], kv, paged, outer_first, outer_last, fresh, scratch)
    else:
        _pack(q, rows, paged.dim, pointer(packed_8d))
        _scores8(pointer(packed_8d), kv, paged, outer_first, outer_last, fresh, scratch)
    for r in range(count):
        first, last = seen(position[r], split, window)
        _weights(scratch, r * PITCH, low, high, first - start, last - start, scale, NODES + r * node, node)
    if count == 1 or inner_first >= inner_last:
        inner_first = inner_last = outer_last
    # What all rows see is added together; what only some see, before it and after it, row by row.
    for after in range(2):
        for r in range(count):
            first, last = seen(position[r], split, window)
            if after:
                first = max(first, inner_last)
            else:
                last = min(last, inner_first)
            _values1(kv, paged, first, last, scratch, r * PITCH, NODES + r * node)
        if not after and inner_first < inner_last:
            if count <= 4:
                _values4(kv, paged, inner_first, inner_last, scratch, node)
            else:
                _values8(kv, paged, inner_first, inner_last, scratch, node)
