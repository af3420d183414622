"""One split's partial of paged attention: the sums over keys, straight from the block table.

Scores, softmax weights and weighted values of one row, or of four that share every read of K and V. Both make the
same sums in the same order (see `attention.py` for the law), so a row does not know whether it stood in a quartet.
Positions are absolute; `blocks`, queries and `scratch` are addressed by element offsets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.simd import (
    add8,
    exp8,
    fma8,
    hmax8,
    hsum8,
    hsum8x8,
    lane8,
    load1,
    load8,
    load8n,
    max8,
    mul8,
    splat8,
    store1,
    store8,
    sub8,
    zero8,
)
from headrace.kernels.ops import SPLIT

__all__ = ["NODES", "ROWS", "Paged", "partial"]

ROWS = 4
LANES = ROWS * (SPLIT + 8)  # scratch offset, after the scores: 16 lanes on their way to scalars
NODES = LANES + 16  # scratch offset of the four partials being built
NEVER = np.float32(-np.inf)


class Paged(NamedTuple):
    """One sequence's keys and values of one layer and kv head, inside the flat cache."""

    blocks: Any
    table_M: Any
    block_stride: int
    keys: int
    values: int
    shift: int
    """log2 of the block size."""
    dim: int


@kernel
def _offset(paged, part, position):
    """Element offset of a position's key or value."""
    block = np.int64(paged.table_M[position >> paged.shift])
    return block * paged.block_stride + part + (position & ((1 << paged.shift) - 1)) * paged.dim


@kernel
def _run_end(paged, position, last):
    """Where the stretch that is contiguous in memory ends."""
    return min(last, ((position >> paged.shift) + 1) << paged.shift)


@intrinsic
def _prefetch(tyctx: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line of an element; never faults and changes nothing."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        form = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0")
        builder.call(function, [pointer, ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)])
        return context.get_dummy_value()

    return types.none(array, types.int64), codegen


@kernel
def _ask(paged, offset, count):
    """Prefetch `count` elements."""
    step = 64 // paged.blocks.itemsize
    for i in range(0, count, step):
        _prefetch(paged.blocks, offset + i)


# ---- scores ----------------------------------------------------------------------------------------------------

@kernel
def _scores4(q, q0, q1, q2, q3, paged, first, last, fresh, scale, scratch):
    """Scores of four rows over positions first … last − 1, row r of position j at scratch[(j mod 256)·4 + r]."""
    kv, dim = paged.blocks, paged.dim
    full, tail = dim & ~7, dim & 7
    scale8 = splat8(scale)
    j = first
    while j < last:
        end = _run_end(paged, j, last)
        k0 = _offset(paged, paged.keys, j)
        next_k = _offset(paged, paged.keys, end) if end < last else k0
        next_v = _offset(paged, paged.values, j)
        while j < end:
            if fresh:
                _ask(paged, next_k, 2 * dim)
                _ask(paged, next_v, 2 * dim)
                next_k += 2 * dim
                next_v += 2 * dim
            k1 = k0 + dim if j + 1 < end else k0
            a0, a1, a2, a3 = zero8(), zero8(), zero8(), zero8()
            b0, b1, b2, b3 = zero8(), zero8(), zero8(), zero8()
            for c in range(0, full, 8):
                ka, kb = load8(kv, k0 + c), load8(kv, k1 + c)
                x = load8(q, q0 + c)
                a0, b0 = fma8(x, ka, a0), fma8(x, kb, b0)
                x = load8(q, q1 + c)
                a1, b1 = fma8(x, ka, a1), fma8(x, kb, b1)
                x = load8(q, q2 + c)
                a2, b2 = fma8(x, ka, a2), fma8(x, kb, b2)
                x = load8(q, q3 + c)
                a3, b3 = fma8(x, ka, a3), fma8(x, kb, b3)
            if tail:
                ka, kb = load8n(kv, k0 + full, tail), load8n(kv, k1 + full, tail)
                x = load8n(q, q0 + full, tail)
                a0, b0 = fma8(x, ka, a0), fma8(x, kb, b0)
                x = load8n(q, q1 + full, tail)
                a1, b1 = fma8(x, ka, a1), fma8(x, kb, b1)
                x = load8n(q, q2 + full, tail)
                a2, b2 = fma8(x, ka, a2), fma8(x, kb, b2)
                x = load8n(q, q3 + full, tail)
                a3, b3 = fma8(x, ka, a3), fma8(x, kb, b3)
            # An odd end writes one position too many: what follows, or the mask, overwrites it.
            store8(scratch, (j & (SPLIT - 1)) * ROWS, mul8(hsum8x8(a0, a1, a2, a3, b0, b1, b2, b3), scale8))
            j += 2
            k0 += 2 * dim
        j = end


@kernel
def _scores1(q, q0, paged, first, last, fresh, scale, scratch):
    """Scores of one row, eight keys at a time, position j at scratch[j mod 256]."""
    kv, dim = paged.blocks, paged.dim
    full, tail = dim & ~7, dim & 7
    scale8 = splat8(scale)
    j = first
    while j < last:
        end = _run_end(paged, j, last)
        k0 = _offset(paged, paged.keys, j)
        next_k = _offset(paged, paged.keys, end) if end < last else k0
        next_v = _offset(paged, paged.values, j)
        while j < end:
            if fresh:
                _ask(paged, next_k, 8 * dim)
                _ask(paged, next_v, 8 * dim)
                next_k += 8 * dim
                next_v += 8 * dim
            left = (end - 1 - j) * dim  # keys past the end repeat the last one; their scores are overwritten
            k1, k2, k3 = k0 + min(dim, left), k0 + min(2 * dim, left), k0 + min(3 * dim, left)
            k4, k5, k6 = k0 + min(4 * dim, left), k0 + min(5 * dim, left), k0 + min(6 * dim, left)
            k7 = k0 + min(7 * dim, left)
            a0, a1, a2, a3 = zero8(), zero8(), zero8(), zero8()
            a4, a5, a6, a7 = zero8(), zero8(), zero8(), zero8()
            for c in range(0, full, 8):
                x = load8(q, q0 + c)
                a0, a1 = fma8(x, load8(kv, k0 + c), a0), fma8(x, load8(kv, k1 + c), a1)
                a2, a3 = fma8(x, load8(kv, k2 + c), a2), fma8(x, load8(kv, k3 + c), a3)
                a4, a5 = fma8(x, load8(kv, k4 + c), a4), fma8(x, load8(kv, k5 + c), a5)
                a6, a7 = fma8(x, load8(kv, k6 + c), a6), fma8(x, load8(kv, k7 + c), a7)
            if tail:
                x = load8n(q, q0 + full, tail)
                a0 = fma8(x, load8n(kv, k0 + full, tail), a0)
                a1 = fma8(x, load8n(kv, k1 + full, tail), a1)
                a2 = fma8(x, load8n(kv, k2 + full, tail), a2)
                a3 = fma8(x, load8n(kv, k3 + full, tail), a3)
                a4 = fma8(x, load8n(kv, k4 + full, tail), a4)
                a5 = fma8(x, load8n(kv, k5 + full, tail), a5)
                a6 = fma8(x, load8n(kv, k6 + full, tail), a6)
                a7 = fma8(x, load8n(kv, k7 + full, tail), a7)
            store8(scratch, j & (SPLIT - 1), mul8(hsum8x8(a0, a1, a2, a3, a4, a5, a6, a7), scale8))
            j += 8
            k0 += 8 * dim
        j = end


# ---- softmax weights -------------------------------------------------------------------------------------------

@kernel
def _mask(scratch, row, stride, low, high, first, last):
    """Set the scores of [low, high) that are outside the row's own [first, last) to -inf (all mod 256)."""
    for j in range(low, min(first, high)):
        store1(scratch, j * stride + row, NEVER)
    for j in range(max(last, low), high):
        store1(scratch, j * stride + row, NEVER)


@kernel
def _weights4(scratch, low, high, node):
    """Scores to weights in place, four rows at once; each row's m and e go to its node.

    low and high are multiples of 8. A vector holds two positions × four rows, so four accumulators are the eight
    lanes of four rows, and adding them in pairs is hsum8's own tree: distance 4, 2, 1.
    """
    best = load8(scratch, low * ROWS)
    for at in range(low * ROWS + 8, high * ROWS, 8):
        best = max8(load8(scratch, at), best)
    m0, m1 = max(lane8(best, 0), lane8(best, 4)), max(lane8(best, 1), lane8(best, 5))
    m2, m3 = max(lane8(best, 2), lane8(best, 6)), max(lane8(best, 3), lane8(best, 7))
    for half in (LANES, LANES + ROWS):
        store1(scratch, half, m0)
        store1(scratch, half + 1, m1)
        store1(scratch, half + 2, m2)
        store1(scratch, half + 3, m3)
    best = load8(scratch, LANES)
    e0, e1, e2, e3 = zero8(), zero8(), zero8(), zero8()
    for at in range(low * ROWS, high * ROWS, 8 * ROWS):
        w0, w1 = exp8(sub8(load8(scratch, at), best)), exp8(sub8(load8(scratch, at + 8), best))
        w2, w3 = exp8(sub8(load8(scratch, at + 16), best)), exp8(sub8(load8(scratch, at + 24), best))
        store8(scratch, at, w0)
        store8(scratch, at + 8, w1)
        store8(scratch, at + 16, w2)
        store8(scratch, at + 24, w3)
        e0, e1, e2, e3 = add8(e0, w0), add8(e1, w1), add8(e2, w2), add8(e3, w3)
    total = add8(add8(e0, e2), add8(e1, e3))
    store8(scratch, LANES + 8, total)
    for row in range(ROWS):
        e = load1(scratch, LANES + 8 + row) + load1(scratch, LANES + 8 + ROWS + row)
        store1(scratch, NODES + (row + 1) * node - 2, load1(scratch, LANES + row))
        store1(scratch, NODES + (row + 1) * node - 1, e)


@kernel
def _weights1(scratch, low, high, node):
    """`_weights4` for one row."""
    best = load8(scratch, low)
    for at in range(low + 8, high, 8):
        best = max8(load8(scratch, at), best)
    m = hmax8(best)
    best = splat8(m)
    total = zero8()
    for at in range(low, high, 8):
        w = exp8(sub8(load8(scratch, at), best))
        store8(scratch, at, w)
        total = add8(total, w)
    store1(scratch, NODES + node - 2, m)
    store1(scratch, NODES + node - 1, hsum8(total))


# ---- weighted values -------------------------------------------------------------------------------------------

@kernel
def _values4(paged, first, last, scratch, node):
    """MA of four rows, two vectors of the head dimension at a time: + p_j · v_j for j = first … last − 1."""
    kv, dim = paged.blocks, paged.dim
    n0, n1, n2, n3 = NODES, NODES + node, NODES + 2 * node, NODES + 3 * node
    for c in range(0, dim & ~15, 16):
        a0, b0 = load8(scratch, n0 + c), load8(scratch, n0 + c + 8)
        a1, b1 = load8(scratch, n1 + c), load8(scratch, n1 + c + 8)
        a2, b2 = load8(scratch, n2 + c), load8(scratch, n2 + c + 8)
        a3, b3 = load8(scratch, n3 + c), load8(scratch, n3 + c + 8)
        j = first
        while j < last:
            end = _run_end(paged, j, last)
            v = _offset(paged, paged.values, j) + c
            p = (j & (SPLIT - 1)) * ROWS
            for _ in range(end - j):
                va, vb = load8(kv, v), load8(kv, v + 8)
                w = splat8(load1(scratch, p))
                a0, b0 = fma8(w, va, a0), fma8(w, vb, b0)
                w = splat8(load1(scratch, p + 1))
                a1, b1 = fma8(w, va, a1), fma8(w, vb, b1)
                w = splat8(load1(scratch, p + 2))
                a2, b2 = fma8(w, va, a2), fma8(w, vb, b2)
                w = splat8(load1(scratch, p + 3))
                a3, b3 = fma8(w, va, a3), fma8(w, vb, b3)
                v += dim
                p += ROWS
            j = end
        store8(scratch, n0 + c, a0)
        store8(scratch, n0 + c + 8, b0)
        store8(scratch, n1 + c, a1)
        store8(scratch, n1 + c + 8, b1)
        store8(scratch, n2 + c, a2)
        store8(scratch, n2 + c + 8, b2)
        store8(scratch, n3 + c, a3)
        store8(scratch, n3 + c + 8, b3)
    for row in range(ROWS):
        for c in range(dim & ~15, dim, 8):
            _values_vector(paged, first, last, scratch, NODES + row * node, row, ROWS, c)


@kernel
def _values1(paged, first, last, scratch, at, row, stride):
    """MA of one row, whose weights are at scratch[(j mod 256)·stride + row] and whose node is at `at`."""
    kv, dim = paged.blocks, paged.dim
    for c in range(0, dim & ~31, 32):
        a0, a1 = load8(scratch, at + c), load8(scratch, at + c + 8)
        a2, a3 = load8(scratch, at + c + 16), load8(scratch, at + c + 24)
        j = first
        while j < last:
            end = _run_end(paged, j, last)
            v = _offset(paged, paged.values, j) + c
            p = (j & (SPLIT - 1)) * stride + row
            for _ in range(end - j):
                w = splat8(load1(scratch, p))
                a0, a1 = fma8(w, load8(kv, v), a0), fma8(w, load8(kv, v + 8), a1)
                a2, a3 = fma8(w, load8(kv, v + 16), a2), fma8(w, load8(kv, v + 24), a3)
                v += dim
                p += stride
            j = end
        store8(scratch, at + c, a0)
        store8(scratch, at + c + 8, a1)
        store8(scratch, at + c + 16, a2)
        store8(scratch, at + c + 24, a3)
    for c in range(dim & ~31, dim, 8):
        _values_vector(paged, first, last, scratch, at, row, stride, c)


@kernel
def _values_vector(paged, first, last, scratch, at, row, stride, c):
    """MA[c : c + 8] of one row; the last vector may be short."""
    width = min(8, paged.dim - c)
    total = load8(scratch, at + c)
    j = first
    while j < last:
        end = _run_end(paged, j, last)
        v = _offset(paged, paged.values, j) + c
        for i in range(j, end):
            w = splat8(load1(scratch, (i & (SPLIT - 1)) * stride + row))
            total = fma8(w, load8n(paged.blocks, v, width), total)
            v += paged.dim
        j = end
    store8(scratch, at + c, total)


# ---- the partial -----------------------------------------------------------------------------------------------

@kernel
def seen(position, split, window):
    """[first, last) of the split's positions that the row at `position` sees; empty when first ≥ last."""
    oldest = max(0, position - window + 1) if window else 0
    return max(split * SPLIT, oldest), min((split + 1) * SPLIT, position + 1)


@kernel
def partial(q, rows, position, count, paged, split, window, fresh, scale, scratch, node):
    """Partials of one split for up to four rows, left in the nodes at scratch[NODES + r·node]: MA, then m and e.

    `rows[r]` is the element offset of row r's query and `position[r]` its position, ascending; unused entries
    repeat the last row. Rows that see nothing of the split get a node without meaning.
    """
    for at in range(NODES, NODES + ROWS * node, 8):
        store8(scratch, at, zero8())
    start, alone = split * SPLIT, count == 1
    outer_first, inner_last = seen(position[0], split, window)
    inner_first, outer_last = seen(position[ROWS - 1], split, window)
    low, high = (outer_first - start) & ~7, ((outer_last - 1 - start) & ~7) + 8
    if alone:
        _scores1(q, rows[0], paged, outer_first, outer_last, fresh, scale, scratch)
    else:
        _scores4(q, rows[0], rows[1], rows[2], rows[3], paged, outer_first, outer_last, fresh, scale, scratch)
    stride = 1 if alone else ROWS
    for r in range(stride):
        first, last = seen(position[r], split, window)
        _mask(scratch, r, stride, low, high, first - start, last - start)
    if alone:
        _weights1(scratch, low, high, node)
    else:
        _weights4(scratch, low, high, node)
    if alone or inner_first >= inner_last:
        inner_first = inner_last = outer_last
    # What all four rows see is added by fours; what only some see, before it and after it, row by row.
    for after in range(2):
        for r in range(count):
            first, last = seen(position[r], split, window)
            if after:
                first = max(first, inner_last)
            else:
                last = min(last, inner_first)
            _values1(paged, first, last, scratch, NODES + r * node, r, stride)
        if not after and inner_first < inner_last:
            _values4(paged, inner_first, inner_last, scratch, node)
