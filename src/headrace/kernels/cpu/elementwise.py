"""The CPU's row-wise operations: embedding, norms, rotary positions, SwiGLU, storing K and V, edits of logits.

A sum over a row has one shape: eight lanes, `hsum8`. Every kernel takes `tasks`: 1 runs on the calling thread, which
for a few rows is cheaper than starting the others; more cuts the rows into that many ranges. Arrays are addressed by
element offsets (see `simd`); shape suffixes are those of `headrace.kernels.ops`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import load1, load8, load8n, store1, store8, store8n
from headrace.kernels.cpu.simd import add8, div8, exp8, fma8, hsum8, mul8, splat8, sub8, zero8
from headrace.kernels.panels import LANES

__all__ = [
    "add_rms_norm",
    "edit_logits",
    "embedding",
    "inverse_rms",
    "mask_logits",
    "rms_norm",
    "rotary",
    "share",
    "silu_mul",
    "store_kv",
]


@kernel
def share(rows, task, tasks):
    """Where the rows of `task` start. (A prange index is unsigned: uncast, it would compile the callee once more.)"""
    return rows * np.int64(task) // tasks


@kernel
def _copy(source, start, target, to, count):
    """target[to …] = source[start …], widened or rounded (to nearest even) to the target's dtype."""
    whole = count & ~7
    for k in range(0, whole, 8):
        store8(target, to + k, load8(source, start + k))
    for k in range(whole, count):
        store1(target, to + k, load1(source, start + k))


@kernel
def inverse_rms(x, start, width, eps):
    """1 / sqrt(mean(x²) + eps) of the `width` elements from `start`."""
    acc = zero8()
    tail = width & 7
    for k in range(0, width - tail, 8):
        u = load8(x, start + k)
        acc = fma8(u, u, acc)
    if tail:
        u = load8n(x, start + width - tail, tail)
        acc = fma8(u, u, acc)
    return np.float32(1) / math.sqrt(hsum8(acc) / np.float32(width) + eps)


@kernel
def _normalize(x, start, width, weight, eps, out, to):
    """out[to …] = x[start …] · inverse rms · weight."""
    scale = splat8(inverse_rms(x, start, width, eps))
    tail = width & 7
    whole = width - tail
    for k in range(0, whole, 8):
        store8(out, to + k, mul8(mul8(load8(x, start + k), scale), load8(weight, k)))
    if tail:
        u = mul8(mul8(load8n(x, start + whole, tail), scale), load8n(weight, whole, tail))
        store8n(out, to + whole, u, tail)


# ---- embedding -------------------------------------------------------------------------------------------------


@kernel
def _embedding_rows(ids, table, term, lane, block, width, out, first, last):
    for t in range(first, last):
        start, to = ids[t] // LANES * block + ids[t] % LANES * lane, t * width
        if term == 1:
            _copy(table, start, out, to, width)
        else:
            for k in range(width):
                store1(out, to + k, load1(table, start + k * term))


@kernel(parallel=True)
def embedding(ids, table, term, lane, block, vocab, width, out, tasks):
    """Copy row ids[t] of the table to out[t], in fp32. A `packing.Matrix` says where the table's rows (lanes) lie.

    Returns the index of the first id outside the table, or -1.
    """
    rows = ids.size
    for t in range(rows):
        if ids[t] < 0 or ids[t] >= vocab:
            return t
    if tasks == 1:
        _embedding_rows(ids, table, term, lane, block, width, out, 0, rows)
    else:
        for task in prange(tasks):
            first, last = share(rows, task, tasks), share(rows, task + 1, tasks)
            _embedding_rows(ids, table, term, lane, block, width, out, first, last)
    return -1


# ---- norms -----------------------------------------------------------------------------------------------------


@kernel
def rms_norm_rows(x, weight, width, eps, out, first, last):
    for t in range(first, last):
        _normalize(x, t * width, width, weight, eps, out, t * width)


@kernel(parallel=True)
def rms_norm(x, rows, width, weight, eps, out, tasks):
    """out[rows, width] = x · rsqrt(mean(x²) + eps) · weight."""
    if tasks == 1:
        rms_norm_rows(x, weight, width, eps, out, 0, rows)
    else:
        for task in prange(tasks):
            rms_norm_rows(x, weight, width, eps, out, share(rows, task, tasks), share(rows, task + 1, tasks))


@kernel
def add_rms_norm_rows(x, residual, weight, width, eps, out, total, first, last):
    tail = width & 7
    for t in range(first, last):
        end = t * width + width - tail
        for k in range(t * width, end, 8):
            store8(total, k, add8(load8(x, k), load8(residual, k)))
        if tail:
            store8n(total, end, add8(load8n(x, end, tail), load8n(residual, end, tail)), tail)
        _normalize(total, t * width, width, weight, eps, out, t * width)


@kernel(parallel=True)
def add_rms_norm(x, residual, rows, width, weight, eps, out, total, tasks):
    """total = x + residual; out = rms_norm(total)."""
    if tasks == 1:
        add_rms_norm_rows(x, residual, weight, width, eps, out, total, 0, rows)
    else:
        for task in prange(tasks):
            add_rms_norm_rows(
                x, residual, weight, width, eps, out, total, share(rows, task, tasks), share(rows, task + 1, tasks)
            )


# ---- rotary positions ------------------------------------------------------------------------------------------


@kernel
def _turn(x, start, half, table, row, out, to):
    """Half-split rotation of one head: (low·cos − high·sin, high·cos + low·sin)."""
    tail = half & 7
    whole = half - tail
    for k in range(0, whole, 8):
        cos, sin = load8(table, row + k), load8(table, row + half + k)
        low, high = load8(x, start + k), load8(x, start + half + k)
        store8(out, to + k, sub8(mul8(low, cos), mul8(high, sin)))
        store8(out, to + half + k, add8(mul8(high, cos), mul8(low, sin)))
    if tail:
        cos, sin = load8n(table, row + whole, tail), load8n(table, row + half + whole, tail)
        low, high = load8n(x, start + whole, tail), load8n(x, start + half + whole, tail)
        store8n(out, to + whole, sub8(mul8(low, cos), mul8(high, sin)), tail)
        store8n(out, to + half + whole, add8(mul8(high, cos), mul8(low, sin)), tail)


@kernel
def rotary_rows(x, x_token, x_head, heads, dim, positions, table, weight, normed, eps, out, first, last):
    for t in range(first, last):
        row = positions[t] * dim
        for h in range(heads):
            start, to = t * x_token + h * x_head, (t * heads + h) * dim
            if normed:
                _normalize(x, start, dim, weight, eps, out, to)
                _turn(out, to, dim // 2, table, row, out, to)
            else:
                _turn(x, start, dim // 2, table, row, out, to)


@kernel(parallel=True)
def rotary(x, x_token, x_head, heads, dim, positions, table, limit, weight, eps, out, tasks):
    """out[t, h] = x[t, h], normalised where `weight` is not empty, turned by table[positions[t]].

    x[t, h] starts at element t·x_token + h·x_head. Returns the first row whose position is not in the table's
    `limit` rows, or -1.
    """
    rows = positions.size
    for t in range(rows):
        if positions[t] < 0 or positions[t] >= limit:
            return t
    if tasks == 1:
        rotary_rows(x, x_token, x_head, heads, dim, positions, table, weight, weight.size > 0, eps, out, 0, rows)
    else:
        for task in prange(tasks):
            rotary_rows(
                x,
                x_token,
                x_head,
                heads,
                dim,
                positions,
                table,
                weight,
                weight.size > 0,
                eps,
                out,
                share(rows, task, tasks),
                share(rows, task + 1, tasks),
            )
    return -1


# ---- SwiGLU ----------------------------------------------------------------------------------------------------


@kernel
def _silu(gate, up):
    one = splat8(np.float32(1))
    return mul8(div8(gate, add8(one, exp8(sub8(zero8(), gate)))), up)


@kernel
def silu_mul_rows(gate_up, width, out, first, last):
    tail = width & 7
    whole = width - tail
    for t in range(first, last):
        gate, up, to = 2 * t * width, 2 * t * width + width, t * width
        for k in range(0, whole, 8):
            store8(out, to + k, _silu(load8(gate_up, gate + k), load8(gate_up, up + k)))
        if tail:
            u = _silu(load8n(gate_up, gate + whole, tail), load8n(gate_up, up + whole, tail))
            store8n(out, to + whole, u, tail)


@kernel(parallel=True)
def silu_mul(gate_up, rows, width, out, tasks):
    """out[rows, width] = silu(gate) · up, of gate_up[rows, 2·width]."""
    if tasks == 1:
        silu_mul_rows(gate_up, width, out, 0, rows)
    else:
        for task in prange(tasks):
            silu_mul_rows(gate_up, width, out, share(rows, task, tasks), share(rows, task + 1, tasks))


# ---- the cache -------------------------------------------------------------------------------------------------


@kernel
def store_kv_rows(k, k_token, k_head, v, v_token, v_head, blocks, shape, layer, slots, first, last):
    _, layers, _, heads, size, dim = shape
    for t in range(first, last):
        slot = np.int64(slots[t])
        if slot < 0:
            continue
        part = (slot // size * layers + layer) * 2
        for h in range(heads):
            to = ((part * heads + h) * size + slot % size) * dim
            _copy(k, t * k_token + h * k_head, blocks, to, dim)
            _copy(v, t * v_token + h * v_head, blocks, to + heads * size * dim, dim)


@kernel(parallel=True)
def store_kv(k, k_token, k_head, v, v_token, v_head, blocks, layer, slots, tasks):
    """Row t's key and value, rounded to the dtype of `blocks`, into slot slots[t] of `layer`; -1 is skipped.

    Returns the first row whose slot lies outside `blocks`, or -1.
    """
    rows = slots.size
    limit = blocks.shape[0] * blocks.shape[4]
    for t in range(rows):
        if slots[t] >= limit:
            return t
    if tasks == 1:
        store_kv_rows(k, k_token, k_head, v, v_token, v_head, blocks, blocks.shape, layer, slots, 0, rows)
    else:
        for task in prange(tasks):
            store_kv_rows(
                k,
                k_token,
                k_head,
                v,
                v_token,
                v_head,
                blocks,
                blocks.shape,
                layer,
                slots,
                share(rows, task, tasks),
                share(rows, task + 1, tasks),
            )
    return -1


# ---- logits ----------------------------------------------------------------------------------------------------


@kernel
def edit_logits(logits, rows, ids, divide, add):
    """z ← (z / divide if z > 0 else z · divide) + add, edit after edit. Returns the first impossible edit, or -1."""
    for e in range(rows.size):
        if rows[e] < 0 or rows[e] >= logits.shape[0] or ids[e] < 0 or ids[e] >= logits.shape[1]:
            return e
    for e in range(rows.size):
        z = logits[rows[e], ids[e]]
        z = z / divide[e] if z > 0 else z * divide[e]
        logits[rows[e], ids[e]] = z + add[e]
    return -1


@kernel
def mask_logits(logits, rows, mask):
    """-inf wherever the token's bit is 0, or the mask too short. Returns the first impossible row, or -1."""
    width = logits.shape[1]
    for e in range(rows.size):
        if rows[e] < 0 or rows[e] >= logits.shape[0]:
            return e
    for e in range(rows.size):
        row_V = logits[rows[e]]
        for first in range(0, width, 32):
            word = mask[e, first >> 5] if first >> 5 < mask.shape[1] else np.int32(0)
            if word == -1:
                continue
            part = row_V[first : min(first + 32, width)]
            # Without a branch, and all of 32 bits, the loop becomes vectors: an eighth of the time.
            for i in range(part.size):
                part[i] = part[i] if word & (np.int32(1) << np.int32(i)) else np.float32(-np.inf)
    return -1
