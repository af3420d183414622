"""One split's partial of paged attention: the sums over keys, straight from the block table.

Scores are sums of tiles whose vectors lie along sixteen keys, a *panel*, which is turned once for all rows that see
it; weighted values are sums of the tiles of products, a run of keys in one block at a time. All heights of tiles make
the same sums in the same order (see `attention.py` for the law), so a row's bits do not depend on its neighbours.
Positions are absolute; `blocks`, queries and `room` are addressed by element offsets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from headrace.kernels.cpu.launch import WIDE, kernel
from headrace.kernels.cpu.memory import load1, load8, load8n, narrow, prefetch, store1, store8
from headrace.kernels.cpu.packing import Matrix, pack
from headrace.kernels.cpu.simd import add8, fma8, hmax8, hsum8, max8, splat8, zero8
from headrace.kernels.cpu.simd16 import exp16, high8, load16, low8, max16, mul16, splat16, store16, sub16
from headrace.kernels.cpu.tiles import LANES, RESUME, score_tile, tile
from headrace.kernels.partials import SPLIT

__all__ = ["NODES", "ROWS", "Paged", "Room", "partial", "prefetch_from", "room_for"]

ROWS = 16 if WIDE else 6
"""Rows of the highest tile."""
PITCH = SPLIT + LANES
"""Scores of a row, position j at j mod 256; rows 1 KB apart would share the sets of the cache."""
NODES = ROWS * PITCH
"""Where in a room the partials lie."""

AHEAD = 64
"""Keys from those in use to those prefetched: blocks lie anywhere, so the hardware cannot predict the next one."""

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
    last: int
    """The keys before this position are there."""


class Room(NamedTuple):
    """A thread's workspace, by offsets: the rows' scores lie at its start, their nodes at `NODES`."""

    at: Any
    node: int
    """Elements of a node: MA, padded to eights, then m and e."""
    queries: int
    """A group of ROWS rows after another, each [element, row]."""
    keys: int
    """Panels of the split, turned: [element, key] each."""
    panel: int
    """Elements from one panel to the next; 0 where a single group of rows reads each as soon as it is turned."""
    beside: int
    """A panel's keys that lie in several blocks, brought together."""


@kernel
def room_for(at, rows, dim):
    """(workspace of `rows` rows that begins at the pointer `at`, and its end)."""
    groups, node, panel = (rows + ROWS - 1) // ROWS, (dim + 7) // 8 * 8 + 8, dim * LANES
    queries = NODES + ROWS * node
    keys = queries + groups * ROWS * dim
    beside = keys + (SPLIT // LANES if groups > 1 else 1) * panel + LANES
    return Room(at, node, queries, keys, panel if groups > 1 else 0, beside), beside + panel + LANES


@kernel
def _key(paged, position):
    """Element offset of a key."""
    block = np.int64(paged.table_M[position >> paged.shift])
    return block * paged.block_stride + paged.keys + (position & ((1 << paged.shift) - 1)) * paged.dim


@kernel
def prefetch_from(paged, position):
    """Prefetch AHEAD keys and values; those that follow are prefetched when these are read."""
    count = LANES * paged.dim
    for first in range(position, min(position + AHEAD, paged.last), LANES):
        key = _key(paged, first)
        for i in range(0, count, 32 if narrow(paged.blocks) else 16):
            prefetch(paged.blocks, key + i), prefetch(paged.blocks, key + paged.values + i)


# ---- scores ----------------------------------------------------------------------------------------------------


@kernel
def _turn(paged, first, room, to):
    """Turn the panel of keys that begins at position `first`, a multiple of 16.

    Keys of the same block that are not there are read too; their scores are masked later.
    """
    kv, dim = paged.blocks, paged.dim
    if 1 << paged.shift >= LANES:
        pack(Matrix(kv, 1, dim, 0), _key(paged, first), LANES, dim, room.at, to, LANES)
    else:
        for i in range(min(LANES, paged.last - first)):
            key = _key(paged, first + i)
            for c in range(0, dim, 8):
                store8(room.at, room.beside + i * dim + c, load8n(kv, key + c, min(8, dim - c)))
        pack(Matrix(room.at, 1, dim, 0), room.beside, LANES, dim, room.at, to, LANES)


@kernel
def _scores(room, count, queries, keys, dim, to, kv, ahead):
    """Of `count` rows and a panel of keys, by the lowest tile that holds them."""
    at = room.at
    if count == 1:
        score_tile(1, at, queries, ROWS, at, keys, dim, at, to, PITCH, kv, ahead)
    elif count == 2:
        score_tile(2, at, queries, ROWS, at, keys, dim, at, to, PITCH, kv, ahead)
    elif count == 3:
        score_tile(3, at, queries, ROWS, at, keys, dim, at, to, PITCH, kv, ahead)
    elif count == 4:
        score_tile(4, at, queries, ROWS, at, keys, dim, at, to, PITCH, kv, ahead)
    elif not WIDE:
        score_tile(6, at, queries, ROWS, at, keys, dim, at, to, PITCH, kv, ahead)
    elif count <= 8:
        score_tile(8, at, queries, ROWS, at, keys, dim, at, to, PITCH, kv, ahead)
    else:
        score_tile(16, at, queries, ROWS, at, keys, dim, at, to, PITCH, kv, ahead)


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
def _values(paged, first, last, room, row, count):
    """MA += p_j · v_j for j = first … last − 1, of `count` rows from `row` on, a run of keys in one block at a time."""
    at, kv, dim, node, low = room.at, paged.blocks, paged.dim, room.node, NODES + row * room.node
    while first < last:
        stop = min(last, ((first >> paged.shift) + 1) << paged.shift)
        w, keys, p = _key(paged, first) + paged.values, stop - first, row * PITCH + (first & (SPLIT - 1))
        ahead = _key(paged, min(first + AHEAD, paged.last - 1)) + paged.values
        c = 0
        while c + LANES <= dim:
            vectors = 4 if count <= (4 if WIDE else 1) and c + 4 * LANES <= dim else 1
            _tile(at, p, count, vectors, kv, w + c, dim, keys, low + c, node, ahead + c)
            c += vectors * LANES
        while c < dim:
            for r in range(count):
                _vector(at, p + r * PITCH, kv, w + c, dim, min(8, dim - c), keys, low + r * node + c)
            c += 8
        first = stop


@kernel
def _tile(at, p, count, vectors, kv, w, dim, keys, to, node, ahead):
    """The lowest tile that holds `count` rows."""
    on = dim * (2 if narrow(kv) else 4)
    if count == 1 and vectors == 4:
        tile(1, 4, at, p, PITCH, 1, 1, kv, w, LANES, dim, keys, at, to, node, RESUME, 0, kv, ahead, on)
    elif count == 1:
        tile(1, 1, at, p, PITCH, 1, 1, kv, w, LANES, dim, keys, at, to, node, RESUME, 0, kv, ahead, on)
    elif count == 2 and vectors == 4:
        tile(2, 4, at, p, PITCH, 1, 2, kv, w, LANES, dim, keys, at, to, node, RESUME, 0, kv, ahead, on)
    elif count == 3 and vectors == 4:
        tile(3, 4, at, p, PITCH, 1, 3, kv, w, LANES, dim, keys, at, to, node, RESUME, 0, kv, ahead, on)
    elif count == 4 and vectors == 4:
        tile(4, 4, at, p, PITCH, 1, 4, kv, w, LANES, dim, keys, at, to, node, RESUME, 0, kv, ahead, on)
    elif count <= 4:
        tile(4, 1, at, p, PITCH, 1, 4, kv, w, LANES, dim, keys, at, to, node, RESUME, 0, kv, ahead, on)
    elif not WIDE:
        tile(6, 1, at, p, PITCH, 1, 6, kv, w, LANES, dim, keys, at, to, node, RESUME, 0, kv, ahead, on)
    elif count <= 8:
        tile(8, 1, at, p, PITCH, 1, 8, kv, w, LANES, dim, keys, at, to, node, RESUME, 0, kv, ahead, on)
    else:
        tile(16, 1, at, p, PITCH, 1, 16, kv, w, LANES, dim, keys, at, to, node, RESUME, 0, kv, ahead, on)


@kernel
def _vector(at, p, kv, w, dim, width, keys, to):
    """What is left of a row: `width` ≤ 8 elements."""
    total = load8(at, to)
    for j in range(keys):
        total = fma8(splat8(load1(at, p + j)), load8n(kv, w + j * dim, width), total)
    store8(at, to, total)


# ---- the partial -----------------------------------------------------------------------------------------------


@kernel
def seen(position, split, window):
    """[first, last) of the split's positions that the row at `position` sees; empty when first ≥ last."""
    oldest = max(0, position - window + 1) if window else 0
    return max(split * SPLIT, oldest), min((split + 1) * SPLIT, position + 1)


@kernel
def partial(queries, position, count, paged, split, window, turned, scale, room):
    """Partials of one split for up to ROWS rows, left in the nodes at NODES + r·node: MA, then m and e.

    The rows' queries lie at `queries` and `position[r]` is row r's position, ascending; unused entries repeat the last
    row. Panels of keys before position `turned` are turned already; returns up to where they are now.
    Rows that see nothing of the split get a node without meaning.
    """
    at, node, start = room.at, room.node, split * SPLIT
    for to in range(NODES, NODES + count * node, 8):
        store8(at, to, zero8())
    outer_first, inner_last = seen(position[0], split, window)
    inner_first, outer_last = seen(position[ROWS - 1], split, window)
    low, high = (outer_first - start) & ~15, ((outer_last - 1 - start) & ~15) + 16
    for j in range(low, high, LANES):
        keys = room.keys + j // LANES * room.panel
        if start + j >= turned:
            _turn(paged, start + j, room, keys)
        ahead = _key(paged, min(start + j + AHEAD, paged.last - 1))
        _scores(room, count, queries, keys, paged.dim, j, paged.blocks, ahead)
    for r in range(count):
        first, last = seen(position[r], split, window)
        _weights(at, r * PITCH, low, high, first - start, last - start, scale, NODES + r * node, node)
    # What all rows see is added together; what only some see, before it and after it, row by row.
    inner_first = min(inner_first, outer_last)
    inner_last = max(inner_first, inner_last)
    for r in range(count):
        first, last = seen(position[r], split, window)
        _values(paged, first, min(last, inner_first), room, r, 1)
    _values(paged, inner_first, inner_last, room, 0, count)
    for r in range(count):
        first, last = seen(position[r], split, window)
        _values(paged, max(first, inner_last), last, room, r, 1)
    return max(turned, start + high)
