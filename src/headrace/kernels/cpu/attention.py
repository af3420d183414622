"""Paged attention on the CPU, straight from the block table (PagedAttention §4.3): no gather, and one law for sums.

A row's keys are cut into splits of 256 positions, aligned to position 0 of its sequence. A split gives a partial
(MA, m, e), Infinite-LLM's names, over the keys that the row sees:

    score_j = scale · hsum8(8-lane FMA dot of q and k_j)        m  = max score_j
    p_j     = exp(score_j − m)                                  e  = hsum8 of lanes j mod 8
    MA      = Σ p_j · v_j, one FMA a key, keys ascending

Partials are merged in a binary tree of nodes aligned to powers of two; the maximal nodes then join left to right.
A split without a visible key is no node at all. So the bits of a row depend on its position, its window and what
it sees: not on chunking, neighbours, block size or threads. Keys a row does not see are never multiplied into it,
not even by 0, so whatever lies there (NaN too) stays out.

Rows of one kv head, (token, head of the group) in this order, are taken four at a time, so one read of K and V
serves a whole group, or several tokens of a chunk; the tiled and the single row make the same sums by
construction. Positions are absolute; `blocks` and `scratch` are addressed by element offsets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import get_num_threads, prange
from numba.core import cgutils, types
from numba.extending import intrinsic

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.simd import (
    add8, div8, exp1, exp8, fma8, hmax8, hsum8, hsum8x8, lane8, load1, load8, load8n, max8, mul8, splat8, store1,
    store8, store8n, sub8, zero8,
)
from headrace.kernels.ops import SPLIT

__all__ = ["attention", "merge", "partial"]

ROWS = 4
TILE = 32  # rows of a work item: K and V of a split stay in the cache between its row quartets
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


@intrinsic
def take(tyctx: Any, counter: Any) -> Any:
    """counter[0]++, atomically: the next work item. Which thread takes it changes no bits."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


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
def _scores4(q, q0, q1, q2, q3, paged, first, last, ahead, scale, scratch):
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
            if ahead:
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
def _scores1(q, q0, paged, first, last, ahead, scale, scratch):
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
            if ahead:
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
def _values4(paged, first, last, ahead, scratch, node):
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
            if c == 0 and j + SPLIT < ahead:
                _ask(paged, _offset(paged, paged.keys, j + SPLIT), (min(end + SPLIT, ahead) - j - SPLIT) * dim)
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
def _values1(paged, first, last, ahead, scratch, at, row, stride):
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
            if c == 0 and j + SPLIT < ahead:
                _ask(paged, _offset(paged, paged.keys, j + SPLIT), (min(end + SPLIT, ahead) - j - SPLIT) * dim)
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


# ---- partials and their tree -----------------------------------------------------------------------------------

@kernel
def _seen(position, split, window):
    """[first, last) of the split's positions that the row at `position` sees; empty when first ≥ last."""
    oldest = max(0, position - window + 1) if window else 0
    return max(split * SPLIT, oldest), min((split + 1) * SPLIT, position + 1)


@kernel
def partial(q, rows, position, count, paged, split, window, ahead, scale, scratch, node):
    """Partials of one split for up to four rows, left in the nodes at scratch[NODES + r·node]: MA, then m and e.

    `rows[r]` is the element offset of row r's query and `position[r]` its position, ascending; unused entries
    repeat the last row. Rows that see nothing of the split get a node without meaning.
    """
    for at in range(NODES, NODES + ROWS * node, 8):
        store8(scratch, at, zero8())
    if count == 1:
        first, last = _seen(position[0], split, window)
        _scores1(q, rows[0], paged, first, last, ahead, scale, scratch)
        low, high = (first & (SPLIT - 1)) & ~7, ((last - 1) & (SPLIT - 1) & ~7) + 8
        _mask(scratch, 0, 1, low, high, first - split * SPLIT, last - split * SPLIT)
        _weights1(scratch, low, high, node)
        _values1(paged, first, last, ahead, scratch, NODES, 0, 1)
        return
    outer_first, _ = _seen(position[0], split, window)
    _, outer_last = _seen(position[ROWS - 1], split, window)
    inner_first, _ = _seen(position[ROWS - 1], split, window)
    _, inner_last = _seen(position[0], split, window)
    _scores4(q, rows[0], rows[1], rows[2], rows[3], paged, outer_first, outer_last, ahead, scale, scratch)
    low, high = (outer_first & (SPLIT - 1)) & ~7, ((outer_last - 1) & (SPLIT - 1) & ~7) + 8
    for r in range(ROWS):
        first, last = _seen(position[r], split, window)
        _mask(scratch, r, ROWS, low, high, first - split * SPLIT, last - split * SPLIT)
    _weights4(scratch, low, high, node)
    if inner_first >= inner_last:
        inner_first = inner_last = outer_last
    for r in range(count):
        first, last = _seen(position[r], split, window)
        _values1(paged, first, min(last, inner_first), 0, scratch, NODES + r * node, r, ROWS)
    _values4(paged, inner_first, inner_last, ahead, scratch, node)
    for r in range(count):
        first, last = _seen(position[r], split, window)
        _values1(paged, max(first, inner_last), last, 0, scratch, NODES + r * node, r, ROWS)


@kernel
def merge(scratch, left, right, node):
    """The node at `right` becomes left ∪ right: both scaled to the greater m, the left one first."""
    m_left, m_right = load1(scratch, left + node - 2), load1(scratch, right + node - 2)
    m = max(m_left, m_right)
    scale_left, scale_right = exp1(m_left - m), exp1(m_right - m)
    e = load1(scratch, left + node - 1) * scale_left + load1(scratch, right + node - 1) * scale_right
    by_left, by_right = splat8(scale_left), splat8(scale_right)
    for c in range(0, node - 8, 8):
        scaled = mul8(load8(scratch, left + c), by_left)
        store8(scratch, right + c, fma8(load8(scratch, right + c), by_right, scaled))
    store1(scratch, right + node - 2, m)
    store1(scratch, right + node - 1, e)


@kernel
def _insert(scratch, fresh, stack, split, oldest, node):
    """Count the node of `split` into a row's binary counter: slot l holds a node of 2^l splits.

    Splits before `oldest` are outside the window: a slot of nothing but those is empty.
    """
    level = 0
    while (split >> level) & 1:
        if (split >> level) << level > oldest:  # the slot's last split is the one before this
            merge(scratch, stack + level * node, fresh, node)
        level += 1
    for c in range(0, node, 8):
        store8(scratch, stack + level * node + c, load8(scratch, fresh + c))


@kernel
def _finish(scratch, stack, splits, oldest, node, out, at, dim):
    """Join a row's maximal nodes left to right and write MA / e."""
    result, covered, level = -1, 0, 62
    while level >= 0:
        if (splits >> level) & 1:
            covered += 1 << level
            if covered > oldest:
                if result >= 0:
                    merge(scratch, result, stack + level * node, node)
                result = stack + level * node
        level -= 1
    e = splat8(load1(scratch, result + node - 1))
    for c in range(0, dim & ~7, 8):
        store8(out, at + c, div8(load8(scratch, result + c), e))
    if dim & 7:
        c = dim & ~7
        store8n(out, at + c, div8(load8(scratch, result + c), e), dim & 7)


# ---- work items ------------------------------------------------------------------------------------------------

@kernel
def _tile(q, paged, token, tokens, position, heads, head, group, window, scale, scratch, node, levels, out):
    """All heads of one group for `tokens` tokens in a row, the first of them at `position`: split by split."""
    rows, at_R, position_R = tokens * group, np.empty(ROWS, np.int64), np.empty(ROWS, np.int64)
    stacks, end = NODES + ROWS * node, position + tokens
    for split in range(_oldest(position, window), (end - 1) // SPLIT + 1):
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            for r in range(ROWS):
                index = row + min(r, count - 1)
                at_R[r] = ((token + index // group) * heads + head + index % group) * paged.dim
                position_R[r] = position + index // group
            if position_R[ROWS - 1] < split * SPLIT or _oldest(position_R[0], window) > split:
                continue
            partial(q, at_R, position_R, count, paged, split, window, end if row == 0 else 0, scale, scratch, node)
            for r in range(count):
                oldest = _oldest(position_R[r], window)
                if oldest <= split and split * SPLIT <= position_R[r]:
                    stack = stacks + (row + r) * levels * node
                    _insert(scratch, NODES + r * node, stack, split, oldest, node)
    for row in range(rows):
        at, place = position + row // group, ((token + row // group) * heads + head + row % group) * paged.dim
        stack = stacks + row * levels * node
        _finish(scratch, stack, at // SPLIT + 1, _oldest(at, window), node, out, place, paged.dim)


@kernel
def _oldest(position, window):
    """The first split of which the row at `position` sees something."""
    return max(0, position - window + 1) // SPLIT if window else 0


@kernel
def _last_start(starts_S1, item):
    """The sequence s with starts_S1[s] ≤ item < starts_S1[s + 1]."""
    low, high = 0, starts_S1.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if starts_S1[middle] <= item:
            low = middle
        else:
            high = middle
    return low


@kernel(parallel=True)
def _attention(q, blocks, shape, layer, table_SM, query_start_S1, context_S, heads, out, scale, window, threads):
    """Every (kv head, sequence, tile of rows) is a work item; a free thread takes the next one."""
    _, layers, _, kv_heads, block_size, dim = shape
    sequences, group = context_S.size, heads // kv_heads
    tile = max(1, TILE // group)
    tiles_S1 = np.zeros(sequences + 1, np.int64)
    longest = 1
    for s in range(sequences):
        tiles_S1[s + 1] = tiles_S1[s] + (query_start_S1[s + 1] - query_start_S1[s] + tile - 1) // tile
        longest = max(longest, context_S[s])
    levels = 1  # a binary counter of n splits has as many slots as n has bits
    while (longest + SPLIT - 1) // SPLIT >> levels:
        levels += 1
    node = (dim + 7) // 8 * 8 + 8
    shift = 0
    while 1 << shift < block_size:
        shift += 1
    part = kv_heads * block_size * dim
    items, counter = tiles_S1[sequences] * kv_heads, np.zeros(1, np.int64)
    for _ in prange(max(1, min(threads, items))):
        scratch = np.empty(NODES + ROWS * node + tile * group * levels * node, np.float32)
        item = take(counter)
        while item < items:
            head, index = item // tiles_S1[sequences], item % tiles_S1[sequences]
            s = _last_start(tiles_S1, index)
            start, end = np.int64(query_start_S1[s]), np.int64(query_start_S1[s + 1])
            first = start + (tiles_S1[s + 1] - 1 - index) * tile  # the last tile, which sees most, goes first
            keys = (2 * layer * kv_heads + head) * block_size * dim
            paged = Paged(blocks, table_SM[s], 2 * layers * part, keys, keys + part, shift, dim)
            _tile(q, paged, first, min(tile, end - first), context_S[s] - (end - first), heads, head * group, group,
                  window, scale, scratch, node, levels, out)
            item = take(counter)


def attention(q_THd: np.ndarray, blocks: np.ndarray, layer: int, block_table_SM: np.ndarray,
              query_start_S1: np.ndarray, context_len_S: np.ndarray, out_THd: np.ndarray, scale: float,
              window: int = 0) -> None:
    """See `Ops.attention`. All arrays are C-contiguous; `blocks` [block, layer, 2, kv_head, token, dim] is float32,
    uint16 (bf16) or int16 (fp16), the meta arrays are int32, q and out fp32 [T, H, d].
    """
    _attention(q_THd, blocks.reshape(-1), blocks.shape, layer, block_table_SM, query_start_S1, context_len_S,
               q_THd.shape[1], out_THd, np.float32(scale), window, get_num_threads())
