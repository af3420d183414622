"""Gradients of causal attention over whole sequences on the CPU, from the forward's log-sum-exp; no L × L scores.

A work item is a sequence and a kv head, with the query heads that read it. Rows come in blocks of `ROWS` and keys in
blocks of `KEYS`, both counted from the sequence's start; with i a row, j a key, c the scale and g the output's gradient

    p_ij = exp(c · q_i·k_j − lse_i), 0 where i does not see j        s_ij = c · p_ij · (g_i·v_j − g_i·out_i)
    g_q_i = Σ_j s_ij · k_j        g_k_j = Σ_i s_ij · q_i        g_v_j = Σ_i p_ij · g_i

All products are those of `product`: a block's terms are one chain, blocks add up in order, and for keys and
values query heads come one after another. So a sequence's gradients do not depend on other sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import load1, load8, load8n, pointer, store1, store8n
from headrace.kernels.cpu.packing import Matrix, pack
from headrace.kernels.cpu.product import LANES, block
from headrace.kernels.cpu.simd import fma8, hsum8, zero8
from headrace.kernels.cpu.simd16 import exp16, load16, mul16, splat16, store16, sub16, zero16
from headrace.kernels.cpu.work import scratch, take

__all__ = ["Heads", "attention_backward"]

ROWS = 48
KEYS = 96
"""Multiples of every tile's height and of a panel's width."""


class Heads(NamedTuple):
    """k or v: token t and head h begin at x[t·row + h·head]."""

    x: Any
    row: int
    head: int


class _Item(NamedTuple):
    """A sequence of `length` tokens, one kv head, and offsets in the workspace."""

    room: Any
    length: Any
    dim: int
    width: int
    """dim, rounded up to panels."""
    keys_turned: int
    values_turned: int
    """[block of keys, panel of keys, element of the head, key]"""
    keys: int
    """[block of keys, panel of the head, key, element]"""
    g_keys: int
    g_values: int
    """[key, width]"""
    rows: int
    g_rows: int
    """[panel, row, element] of the block's q and g"""
    weights: int
    slopes: int
    """[row, KEYS]: p and s"""
    g_queries: int
    """[row, width]"""
    own: int
    """A row's g · out."""


@kernel
def _turn(x, at, row, length, dim, room, to):
    """A head's rows, element by element, a panel of keys at a time."""
    for j in range(0, length, LANES):
        pack(Matrix(x, 1, row, 0), at + j * row, min(LANES, length - j), dim, room, to + j * dim, LANES)


@kernel
def _panels(x, at, row, count, dim, room, to):
    """`count` rows of a head, row by row, a panel of elements at a time."""
    for c in range(0, dim, LANES):
        pack(Matrix(x, row, 1, 0), at + c, min(LANES, dim - c), count, room, to + c * count, LANES)


@kernel
def _own(g, out, at, row, count, dim, room, to):
    """g · out of `count` rows."""
    for i in range(count):
        acc = zero8()
        for c in range(0, dim, 8):
            n = min(8, dim - c)
            acc = fma8(load8n(g, at + i * row + c, n), load8n(out, at + i * row + c, n), acc)
        store1(room, to + i, hsum8(acc))


@kernel
def _soften(item, lse, at, apart, first_row, rows, first_key, keys, window, scale):
    """Scores and g · v of a block, in place, to p and s."""
    room, by = item.room, splat16(scale)
    for i in range(rows):
        row = first_row + i
        low = max(0, row - window + 1 - first_key) if window else 0
        high = min(keys, row + 1 - first_key)
        shift, own = splat16(load1(lse, at + i * apart)), splat16(load1(room, item.own + i))
        p, s = item.weights + i * KEYS, item.slopes + i * KEYS
        for j in range(0, keys, 16):
            weight = exp16(sub16(mul16(load16(room, p + j), by), shift))
            store16(room, p + j, weight)
            store16(room, s + j, mul16(mul16(by, weight), sub16(load16(room, s + j), own)))
            if j < low or j + 16 > high:
                for unseen in range(j, j + 16):
                    if unseen < low or unseen >= high:
                        store1(room, p + unseen, np.float32(0))
                        store1(room, s + unseen, np.float32(0))


@kernel
def _rows(item, q, g, at, row, lse, lse_at, heads, first_row, rows, window, scale):
    """What a block of rows of one query head adds: g_k and g_v of what it sees, and all of its own g_q."""
    room, dim, width, first = item.room, item.dim, item.width, True
    _panels(q, at, row, rows, dim, room, item.rows)
    _panels(g, at, row, rows, dim, room, item.g_rows)
    oldest = max(0, first_row - window + 1) // KEYS * KEYS if window else 0
    for key in range(oldest, first_row + rows, KEYS):
        keys, tall = min(KEYS, first_row + rows - key), min(KEYS, item.length - key)
        turned, here, p, s = key * dim, key * width, item.weights, item.slopes
        block(rows, q, at, row, 1, room, item.keys_turned + turned, dim * LANES, dim, keys, room, p, KEYS, 0)
        block(rows, g, at, row, 1, room, item.values_turned + turned, dim * LANES, dim, keys, room, s, KEYS, 0)
        _soften(item, lse, lse_at, heads, first_row, rows, key, keys, window, scale)
        to, panel = item.g_queries, tall * LANES
        block(rows, room, s, KEYS, 1, room, item.keys + here, panel, keys, dim, room, to, width, int(not first))
        to, panel = item.g_keys + here, rows * LANES
        block(keys, room, s, 1, KEYS, room, item.rows, panel, rows, dim, room, to, width, 1)
        to = item.g_values + here
        block(keys, room, p, 1, KEYS, room, item.g_rows, panel, rows, dim, room, to, width, 1)
        first = False


@kernel
def _write(room, start, width, rows, dim, out, at, row):
    """Copy a head's rows to the result."""
    for i in range(rows):
        for c in range(0, dim, 8):
            store8n(out, at + i * row + c, load8(room, start + i * width + c), min(8, dim - c))


@kernel
def _item(item, start, head, group, heads, kv_heads, q, k, v, g, out, lse, g_q, g_k, g_v, window, scale):
    """The gradients of one sequence, whose first token is `start`, and one kv head."""
    room, length, dim, width = item.room, item.length, item.dim, item.width
    k_at, v_at = start * k.row + head * k.head, start * v.row + head * v.head
    _turn(k.x, k_at, k.row, length, dim, room, item.keys_turned)
    _turn(v.x, v_at, v.row, length, dim, room, item.values_turned)
    for key in range(0, length, KEYS):
        _panels(k.x, k_at + key * k.row, k.row, min(KEYS, length - key), dim, room, item.keys + key * width)
    padded = (length + KEYS - 1) // KEYS * KEYS * width
    for at in range(0, padded, 16):
        store16(room, item.g_keys + at, zero16()), store16(room, item.g_values + at, zero16())
    row = heads * dim
    for query_head in range(head * group, (head + 1) * group):
        for first in range(0, length, ROWS):
            rows, at = min(ROWS, length - first), (start + first) * row + query_head * dim
            _own(g, out, at, row, rows, dim, room, item.own)
            _rows(item, q, g, at, row, lse, (start + first) * heads + query_head, heads, first, rows, window, scale)
            _write(room, item.g_queries, width, rows, dim, g_q, at, row)
    at, row = (start * kv_heads + head) * dim, kv_heads * dim
    _write(room, item.g_keys, width, length, dim, g_k, at, row)
    _write(room, item.g_values, width, length, dim, g_v, at, row)


@kernel
def _workspace(room, at, longest, dim):
    """The offsets of an item of at most `longest` tokens in `room` from `at`, without its length; the end."""
    width, keys = (dim + LANES - 1) // LANES * LANES, (longest + KEYS - 1) // KEYS * KEYS
    turned = (keys * dim + 15) // 16 * 16
    b = at + 2 * turned
    c = b + 3 * keys * width
    d = c + 2 * ROWS * width
    e = d + 2 * ROWS * KEYS
    item = _Item(
        room,
        0,
        dim,
        width,
        at,
        at + turned,
        b,
        b + keys * width,
        b + 2 * keys * width,
        c,
        c + ROWS * width,
        d,
        d + ROWS * KEYS,
        e,
        e + ROWS * width,
    )
    return item, e + ROWS * width + ROWS


@kernel(parallel=True)
def attention_backward(q, k, v, g, out, lse, starts_S1, heads, kv_heads, dim, g_q, g_k, g_v, scale, window, threads):
    """Every (kv head, sequence) is a work item; a free thread takes the next one.

    q, g, out, g_q [T, H, d], lse [T, H] and g_k, g_v [T, G, d] are contiguous fp32; k and v are `Heads`.
    """
    sequences, longest = starts_S1.size - 1, 0
    for s in range(sequences):
        longest = max(longest, starts_S1[s + 1] - starts_S1[s])
    items, counter = sequences * kv_heads, np.zeros(1, np.int64)
    for _ in prange(max(1, min(threads, items))):
        _take_items(
            q,
            k,
            v,
            g,
            out,
            lse,
            starts_S1,
            longest,
            heads,
            kv_heads,
            dim,
            g_q,
            g_k,
            g_v,
            scale,
            window,
            counter.ctypes.data,
        )


@kernel
def _take_items(q, k, v, g, out, lse, starts_S1, longest, heads, kv_heads, dim, g_q, g_k, g_v, scale, window, counter):
    """One thread's work. Its workspace is passed on as an array, since an array is freed after its last use."""
    size = _workspace(pointer(q), 0, longest, dim)[1]
    room, at = scratch(size)
    _items(
        room, at, q, k, v, g, out, lse, starts_S1, longest, heads, kv_heads, dim, g_q, g_k, g_v, scale, window, counter
    )


@kernel
def _items(
    room, at, q, k, v, g, out, lse, starts_S1, longest, heads, kv_heads, dim, g_q, g_k, g_v, scale, window, counter
):
    item = _workspace(pointer(room), at, longest, dim)[0]
    ks, vs = Heads(pointer(k.x), k.row, k.head), Heads(pointer(v.x), v.row, v.head)
    index = take(counter)
    while index < (starts_S1.size - 1) * kv_heads:
        s, head = index // kv_heads, index % kv_heads
        start = np.int64(starts_S1[s])
        own = _Item(item.room, np.int64(starts_S1[s + 1]) - start, *item[2:])
        _item(
            own,
            start,
            head,
            heads // kv_heads,
            heads,
            kv_heads,
            pointer(q),
            ks,
            vs,
            pointer(g),
            pointer(out),
            pointer(lse),
            pointer(g_q),
            pointer(g_k),
            pointer(g_v),
            window,
            scale,
        )
        index = take(counter)
