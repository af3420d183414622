"""The products of a linear and of its gradients: one order of sums for every shape, storage, thread and register.

    y[m, n] = Σ_k left(m, k) · right(k, n) + bias[n]

The k lie in *virtual shards*. A shard is cut into chunks of `CHUNK` terms; a chunk is one chain of fused multiply-adds
from +0, k ascending; the first chunk of a shard is stored and the others are added in order; shards are added in a
balanced tree, neighbours first; the bias comes last. A shard without terms is +0. Vectors lie along n, so nothing is
added across lanes: how outputs are cut into tasks, panels and tiles changes no sum, and neither do the width of the
registers or where the operands' elements lie (`Matrix`).

A thread takes tasks of some rows by some outputs, and of a task a panel of sixteen outputs at a time. A tile passes
over all terms of a panel before the next tile: its sums wait in the first-level cache. Only where there are more than
`PASS` terms, all tiles' sums wait in `room` from one pass to the next.
"""

from __future__ import annotations

from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from headrace.kernels.cpu.launch import WIDE, kernel
from headrace.kernels.cpu.memory import load8, load8n, narrow, pointer, store8, store8n
from headrace.kernels.cpu.packing import Matrix, pack
from headrace.kernels.cpu.simd import add8
from headrace.kernels.cpu.tiles import LANES, tile, turned_tile
from headrace.kernels.cpu.work import scratch, take

__all__ = ["CHUNK", "HEIGHT", "LANES", "block", "product", "product_alone", "tasks_of", "work"]

CHUNK = 256
"""Terms of one chain."""
PASS = 2048
"""Most terms for which operands are packed at once."""
HEIGHT = 16 if WIDE else 6
"""Rows of the highest tile."""
FEW = 8 if WIDE else 4
"""Most rows for which rows of a weight are turned in registers."""
SLAB = HEIGHT * LANES
"""Elements of a tile's sums at one level of the tree of shards."""
TASKS = 8
"""For each thread."""
DIRECT, TURNED, PACKED = range(3)
"""How tiles read the right operand: panels where they are, rows of a weight where they are, or from the workspace."""


class _Job(NamedTuple):
    """A product, the extent of a task, and the workspace of one thread."""

    left: Any
    right: Any
    bias: Any
    biased: bool
    y: Any
    rows: int
    outputs: int
    adds: bool
    chunks: Any
    levels: int
    height: int
    width: int
    room: Any
    sums: int
    left_at: int
    """Where the left operand's rows of a task are packed; negative for a single row, read where it is."""
    pitch: int
    """Of a packed term: HEIGHT, or 1 for a single row."""
    right_at: int
    way: int


class _Task(NamedTuple):
    """Rows m … m + rows − 1 by outputs n … stop − 1."""

    m: int
    rows: int
    n: int
    stop: int


# ---- tiles of any height ---------------------------------------------------------------------------------------


@kernel
def _across(rows):
    """How many vectors the tile of so many rows has in panels: enough sums at once to hide an addition's latency."""
    if rows <= 2:
        return 4 if WIDE or rows == 1 else 2
    if WIDE and rows <= 8:
        return 4 if rows <= 4 else 2
    return 1


@kernel
def _tile(single, rows, vectors, x, x0, w, w0, panel, count, sums, to, pitch, adds, far, ask, on):
    """The lowest tile that holds `rows` packed rows; `single`: the only row of a product, term after term."""
    if single and vectors == 4:
        tile(1, 4, x, x0, 1, 1, 1, w, w0, panel, LANES, count, sums, to, pitch, adds, SLAB, far, ask, on)
    elif single:
        tile(1, 1, x, x0, 1, 1, 1, w, w0, panel, LANES, count, sums, to, pitch, adds, SLAB, far, ask, on)
    elif not WIDE:
        _narrow_tile(rows, vectors, x, x0, w, w0, panel, count, sums, to, pitch, adds, far, ask, on)
    elif vectors == 4 and rows <= 2:
        tile(2, 4, x, x0, 1, HEIGHT, 2, w, w0, panel, LANES, count, sums, to, pitch, adds, SLAB, far, ask, on)
    elif vectors == 4:
        tile(4, 4, x, x0, 1, HEIGHT, 4, w, w0, panel, LANES, count, sums, to, pitch, adds, SLAB, far, ask, on)
    elif vectors == 2:
        tile(8, 2, x, x0, 1, HEIGHT, 8, w, w0, panel, LANES, count, sums, to, pitch, adds, SLAB, far, ask, on)
    elif rows <= 8:
        tile(8, 1, x, x0, 1, HEIGHT, 8, w, w0, panel, LANES, count, sums, to, pitch, adds, SLAB, far, ask, on)
    else:
        tile(16, 1, x, x0, 1, HEIGHT, 16, w, w0, panel, LANES, count, sums, to, pitch, adds, SLAB, far, ask, on)


@kernel
def _narrow_tile(rows, vectors, x, x0, w, w0, panel, count, sums, to, pitch, adds, far, ask, on):
    """The same in sixteen registers of 256 bits."""
    if vectors == 2:
        tile(2, 2, x, x0, 1, HEIGHT, 2, w, w0, panel, LANES, count, sums, to, pitch, adds, SLAB, far, ask, on)
    elif rows <= 4:
        tile(4, 1, x, x0, 1, HEIGHT, 4, w, w0, panel, LANES, count, sums, to, pitch, adds, SLAB, far, ask, on)
    else:
        tile(6, 1, x, x0, 1, HEIGHT, 6, w, w0, panel, LANES, count, sums, to, pitch, adds, SLAB, far, ask, on)


@kernel
def _turned_tile(single, rows, x, x0, w, w0, lane, lanes, count, sums, to, adds, ask):
    """The same of rows of a weight, up to FEW."""
    if single:
        turned_tile(1, x, x0, 1, 1, 1, w, w0, lane, lanes, count, sums, to, LANES, adds, SLAB, ask)
    elif rows <= 4 or not WIDE:
        turned_tile(4, x, x0, 1, HEIGHT, 4, w, w0, lane, lanes, count, sums, to, LANES, adds, SLAB, ask)
    else:
        turned_tile(8, x, x0, 1, HEIGHT, 8, w, w0, lane, lanes, count, sums, to, LANES, adds, SLAB, ask)


@kernel
def block(rows, x, x0, row, step, w, w0, panel, count, outputs, sums, to, pitch, adds):
    """sums[rows, outputs] at `to`: chains of `count` terms, added to what is there if `adds` is 1.

    Element (r, k) of the left operand is x[x0 + r·row + k·step], where it is. Rows and outputs past the end are written
    too, up to multiples of `HEIGHT` and `LANES`.
    """
    for n in range(0, outputs, LANES):
        for r in range(0, rows, HEIGHT):
            some, at, x_at = min(HEIGHT, rows - r), to + r * pitch + n, x0 + r * row
            if not WIDE:
                tile(6, 1, x, x_at, row, step, some, w, w0, 0, LANES, count, sums, at, pitch, adds, 0, w, w0, 0)
            elif some <= 8:
                tile(8, 1, x, x_at, row, step, some, w, w0, 0, LANES, count, sums, at, pitch, adds, 0, w, w0, 0)
            else:
                tile(16, 1, x, x_at, row, step, some, w, w0, 0, LANES, count, sums, at, pitch, adds, 0, w, w0, 0)
        w0 += panel


# ---- a task ----------------------------------------------------------------------------------------------------


@kernel
def _finish(job, row, rows, n, stop, at, pitch):
    """y of `rows` rows from `row` and of outputs n … stop − 1: the sums at room[at], and the bias."""
    for r in range(rows):
        for v in range(0, stop - n, 8):
            value, count = load8(job.room, at + r * pitch + v), min(8, stop - n - v)
            if job.biased:
                value = add8(value, load8n(job.bias, n + v, count))
            store8n(job.y, (row + r) * job.outputs + n + v, value, count)


@kernel
def _resume(job, row, rows, n, stop, at, pitch):
    """The way back: room[at …] = y."""
    for r in range(rows):
        for v in range(0, stop - n, 8):
            value = load8n(job.y, (row + r) * job.outputs + n + v, min(8, stop - n - v))
            store8(job.room, at + r * pitch + v, value)


@kernel
def _pack_left(job, task, first, last, terms):
    """The task's rows, tile by tile: [tile, term, row]."""
    left, chunks, pitch = job.left, job.chunks, job.pitch
    for j in range(0, task.rows, HEIGHT):
        to = job.left_at + j * terms
        for c in range(first, last):
            at = (task.m + j) * left.lane + chunks[c, 0] * left.term
            pack(left, at, min(HEIGHT, task.rows - j), chunks[c, 2], job.room, to, pitch)
            to += chunks[c, 2] * pitch


@kernel
def _ahead(job, task, j, n, vectors, terms, first_right):
    """(element of `right` that a tile of rows j … prefetches, and how many bytes further for each of its terms).

    The task's tiles share out what follows the panels in memory, or one reads the next panel where terms lie apart.
    """
    right, size = job.right, 2 if narrow(job.right.at) else 4
    if right.term > LANES:
        at = n // LANES * right.block + first_right * right.term
        return (at + right.block, right.term * size) if j == 0 else (at, 0)
    if job.way == DIRECT and task.rows <= 4:  # a few long streams, which the hardware predicts
        return n // LANES * right.block, 0
    tiles, bytes_a_term = (task.rows + HEIGHT - 1) // HEIGHT, vectors * LANES * size
    on, number = max(1, bytes_a_term // tiles), j // HEIGHT
    if number * on > bytes_a_term:
        on, number = 0, 0
    return (n // LANES + vectors) * right.block + (number * terms + first_right) * on // size, on


@kernel
def _sums(job, task, j, n, stop, vectors, first, last, terms, slot):
    """The chunks of one tile, rows j … of the task and outputs n … stop − 1, to the sums at `slot`."""
    left, right, chunks, room, rows = job.left, job.right, job.chunks, job.room, min(HEIGHT, task.rows - j)
    pitch, single = vectors * LANES, job.rows == 1
    for c in range(first, last):
        k, count, to, adds = chunks[c, 5] - chunks[first, 5], chunks[c, 2], slot + chunks[c, 3] * SLAB, chunks[c, 4]
        if job.adds and c == 0:
            adds = 1
        x, x0 = left.at, task.m * left.lane + chunks[c, 0] * left.term
        if job.left_at >= 0:
            x, x0 = room, job.left_at + j * terms + k * job.pitch
        w, w0 = right.at, n // LANES * right.block + chunks[c, 1] * right.term
        ask, on = _ahead(job, task, j, n, vectors, terms, chunks[c, 1])
        if job.way == DIRECT:
            _tile(single, rows, vectors, x, x0, w, w0, right.block, count, room, to, pitch, adds, w, ask, on)
        elif job.way == TURNED:
            _turned_tile(single, rows, x, x0, w, w0, right.lane, stop - n, count, room, to, adds, ask)
        else:
            at = job.right_at + k * LANES
            if j == 0:  # the first tile packs
                pack(right, w0, stop - n, count, room, at, LANES)
            _tile(single, rows, 1, x, x0, room, at, 0, count, room, to, pitch, adds, w, ask, on)


@kernel
def _pass(job, task, first, last, whole, held):
    """Chunks first … last − 1 of a task's sums; `whole`: there are no others; `held`: its rows are packed already."""
    chunks, most = job.chunks, job.chunks.shape[0]
    terms = chunks[last - 1, 5] + chunks[last - 1, 2] - chunks[first, 5]
    if job.left_at >= 0 and not held:
        _pack_left(job, task, first, last, terms)
    n, slot = task.n, job.sums
    while n < task.stop:
        vectors = _across(task.rows) if job.way == DIRECT else 1
        if n + (vectors - 1) * LANES >= task.stop:
            vectors = 1
        stop, pitch = min(n + vectors * LANES, task.stop), vectors * LANES
        for j in range(0, task.rows, HEIGHT):
            rows = min(HEIGHT, task.rows - j)
            if job.adds and first == 0:
                _resume(job, task.m + j, rows, n, stop, slot, pitch)
            _sums(job, task, j, n, stop, vectors, first, last, terms, slot)
            if last == most:
                _finish(job, task.m + j, rows, n, stop, slot, pitch)
            if not whole:
                slot += job.levels * SLAB
        n = stop


@kernel
def _take_tasks(job, limit, counter):
    """Tasks until none is left; returns how many."""
    did, held = 0, -1
    across, most = (job.outputs + job.width - 1) // job.width, job.chunks.shape[0]
    tasks, index = (job.rows + job.height - 1) // job.height * across, take(counter)
    while index < tasks:
        m, n = index // across * job.height, index % across * job.width
        task = _Task(m, min(job.height, job.rows - m), n, min(n + job.width, job.outputs))
        first = 0
        while first < most:
            last = first + 1
            while last < most and job.chunks[last, 5] + job.chunks[last, 2] - job.chunks[first, 5] <= limit:
                last += 1
            whole = first == 0 and last == most
            _pass(job, task, first, last, whole, whole and held == m)
            first, held = last, m
        did += 1
        index = take(counter)
    return did


# ---- the whole product -----------------------------------------------------------------------------------------


@kernel
def tasks_of(rows, outputs, threads):
    """How many tasks a product has."""
    height, width = _extent(rows, outputs, threads)
    return (rows + height - 1) // height * ((outputs + width - 1) // width)


@kernel
def _extent(rows, outputs, threads):
    """(rows, outputs) of a task: as square as a few blocks of rows allow, since both operands are packed."""
    tasks, blocks = TASKS * threads, 1
    if rows > 64:
        side = max(64, min(512, np.int64(sqrt(rows * outputs / tasks))))
        blocks = (rows + side - 1) // side
    height, across = (rows + blocks - 1) // blocks, (tasks + blocks - 1) // blocks
    width = (outputs + across - 1) // across
    return max(1, (height + HEIGHT - 1) // HEIGHT) * HEIGHT, max(1, (width + 63) // 64) * 64


@kernel
def _begin(left, right, bias, biased, y, rows, outputs, adds, chunks, levels, extent, way, limit, room, at, counter):
    """The workspace is passed on as an array, since an array is freed after its last use."""
    job = _Job(
        left,
        right,
        bias,
        biased,
        y,
        rows,
        outputs,
        adds,
        chunks,
        levels,
        extent[0],
        extent[1],
        pointer(room),
        at[0],
        at[1],
        1 if rows == 1 else HEIGHT,
        at[2],
        way,
    )
    return _take_tasks(job, limit, counter)


@kernel
def work(left, right, bias, biased, y, rows, outputs, adds, chunks, levels, threads, counter):
    """One thread of `product`, by pointers: takes tasks until none is left, and returns how many."""
    terms, extent = chunks[-1, 5] + chunks[-1, 2], _extent(rows, outputs, threads)
    way = PACKED
    if right.term == LANES and right.lane == 1:
        way = DIRECT
    elif right.term == 1 and rows <= FEW:
        way = TURNED
    turned = rows > 1 or left.term != 1
    limit = PASS if turned or way == PACKED else terms
    most = min(terms, limit)
    sums = levels * SLAB * (extent[0] // HEIGHT * (extent[1] // LANES) if terms > limit else 1)
    block = extent[0] * most + 16 if turned else 0
    room, start = scratch(sums + block + (LANES * most if way == PACKED else 0))
    at = (start, start + sums if turned else -1, start + sums + block)
    return _begin(
        left, right, bias, biased, y, rows, outputs, adds, chunks, levels, extent, way, limit, room, at, counter
    )


@kernel
def _part(
    x, x_term, x_lane, w, w_term, w_lane, w_block, bias, y, rows, outputs, adds, chunks, levels, threads, counter
):
    """`work` on arrays."""
    left, right = Matrix(pointer(x), x_term, x_lane, 0), Matrix(pointer(w), w_term, w_lane, w_block)
    biased, at = bias.size > 0, counter.ctypes.data
    work(left, right, pointer(bias), biased, pointer(y), rows, outputs, adds, chunks, levels, threads, at)


@kernel
def product_alone(x, x_term, x_lane, w, w_term, w_lane, w_block, bias, y, rows, outputs, adds, chunks, levels):
    """`product` on the calling thread."""
    counter = np.zeros(1, np.int64)
    _part(x, x_term, x_lane, w, w_term, w_lane, w_block, bias, y, rows, outputs, adds, chunks, levels, 1, counter)


@kernel(parallel=True)
def product(x, x_term, x_lane, w, w_term, w_lane, w_block, bias, y, rows, outputs, adds, chunks, levels, threads):
    """y[rows, outputs] = left · right + bias, or += where `adds`; flat arrays, fp32 but `w`; `bias` may be empty.

    The operands are `Matrix(x, x_term, x_lane)` and `Matrix(w, w_term, w_lane, w_block)`. chunks, int64 [·, 6]: the
    first term of left and of right, how many, the level of the tree at which the sum is stored, how many sums from
    there on are added to it, and the number of terms before. See `views.chunks`.
    """
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        _part(
            x,
            x_term,
            x_lane,
            w,
            w_term,
            w_lane,
            w_block,
            bias,
            y,
            rows,
            outputs,
            adds,
            chunks,
            levels,
            threads,
            counter,
        )
