"""y = x @ W.T + bias on the CPU: one order of summation for every row count, output count and weight dtype.

An output is a sum over K in eight lanes (see `simd`). With `bounds` (0, …, K) each virtual shard is summed alone,
from lane 0 at its first input, and a balanced binary tree adds the shards' sums; the bias comes last. All
`tiles` make the same sum. Two ways to lay them out:

    few rows     W is read once, straight from memory, in its own dtype
    many rows    x is cut into panels that stay in the second-level cache. Eight outputs at a time, a chunk of K at a
                 time, W (widened to fp32, which is exact) stays in the first-level cache while the panel is read

Each thread takes an equal run of the tasks, which are one panel by 32 outputs. A thread keeps the sums of its panel in
`sums` [shard, eight outputs, row of the panel, output of the eight].
"""

from __future__ import annotations

import numpy as np
from numba import prange

from headrace.kernels.cpu.launch import WIDE, kernel
from headrace.kernels.cpu.memory import load1, load8, load8n, narrow, pointer, prefetch, store1, store8, store8n, widest
from headrace.kernels.cpu.simd import add8
from headrace.kernels.cpu.simd16 import load16, store16
from headrace.kernels.cpu.tiles import tile1x8, tile4x2, tile4x3, tile8x4
from headrace.kernels.cpu.work import scratch

__all__ = ["SHARDS", "linear", "linear_part"]

SHARDS = 16
"""Most virtual shards that a sum may have."""

BLOCK = 32  # outputs of a task
MANY = 5 if WIDE else 8  # rows from which widening W, and packing x, pays
PANEL = 1 << 17  # most elements of x in a panel, or eight rows
CHUNK = 768 if WIDE else 512  # most inputs of a chunk


@kernel
def _finish(sums, shards, slab, row, rows, first, last, width, bias, y):
    """y of `rows` rows from `row`: the balanced tree over the shards (neighbours first), then the bias.

    Each eight outputs of first … last − 1 have a slab of sums; a row is written whole lines at a time.
    """
    slabs, step = (last - first + 7) // 8, 1
    while step < shards:
        for s in range(0, shards, 2 * step):
            for j in range(slabs):
                a, b = (s * slabs + j) * slab, ((s + step) * slabs + j) * slab
                for i in range(0, rows * 8, 8):
                    store8(sums, a + i, add8(load8(sums, a + i), load8(sums, b + i)))
        step *= 2
    for r in range(rows):
        for n in range(first, last, 8):
            value, count = load8(sums, (n - first) // 8 * slab + r * 8), min(8, last - n)
            if bias.size:
                value = add8(value, load8n(bias, n, count))
            store8n(y, (row + r) * width + n, value, count)


@kernel
def _prefetch(w, start, stride, count, tile, tiles):
    """Before `tile` of `tiles`: prefetch its part of the next eight outputs' chunk, which starts at w[start].

    Tiles read too many short streams for the hardware to predict.
    """
    part = (8 + tiles - 1) // tiles
    line = 32 if narrow(w) else 16
    for j in range(tile * part, min(tile * part + part, 8)):
        for k in range(0, count, line):
            prefetch(w, start + j * stride + k)


# ---- few rows --------------------------------------------------------------------------------------------------


@kernel
def _few(x, row, rows, inputs, w, first, last, width, bias, bounds, room, y):
    """Fours (a rest of three repeats its last row), then one or two singly; outputs past `last` repeat the last."""
    shards, end, sums = bounds.size - 1, (last - 1) * inputs, pointer(room)
    while row < rows:
        height = 4 if rows - row > 2 else 1
        x0, x_end = row * inputs, (rows - 1) * inputs
        x1, x2, x3 = min(x0 + inputs, x_end), min(x0 + 2 * inputs, x_end), min(x0 + 3 * inputs, x_end)
        for n in range(first, last, 8):
            w0 = n * inputs
            w1, w2, w3 = min(w0 + inputs, end), min(w0 + 2 * inputs, end), min(w0 + 3 * inputs, end)
            w4, w5, w6 = min(w0 + 4 * inputs, end), min(w0 + 5 * inputs, end), min(w0 + 6 * inputs, end)
            w7 = min(w0 + 7 * inputs, end)
            for s in range(shards):
                k, count, to = bounds[s], bounds[s + 1] - bounds[s], s * 32
                if height == 1:
                    tile1x8(
                        x,
                        x0 + k,
                        w,
                        w0 + k,
                        w1 + k,
                        w2 + k,
                        w3 + k,
                        w4 + k,
                        w5 + k,
                        w6 + k,
                        w7 + k,
                        count,
                        (n + 8) * inputs + 8 * k,
                        sums,
                        to,
                    )
                else:
                    for j in range(0, 8, 2):
                        _prefetch(w, w0 + 8 * inputs + k, inputs, count, j // 2, 4)
                        u, v = min(w0 + j * inputs, end), min(w0 + (j + 1) * inputs, end)
                        tile4x2(
                            x,
                            x0 + k,
                            x1 + k,
                            x2 + k,
                            x3 + k,
                            w,
                            u + k,
                            v + k,
                            count,
                            True,
                            True,
                            sums,
                            0,
                            sums,
                            to + j,
                            8,
                        )
            _finish(sums, shards, 32, row, min(height, rows - row), n, min(n + 8, last), width, bias, y)
        row += height


# ---- many rows -------------------------------------------------------------------------------------------------


@kernel
def _pack(x, row, rows, inputs, bounds, packed, to):
    """Rows row … rows − 1 in groups of eight: see `tile8x4`. A last group is filled with its last row."""
    for group in range(row, rows, 8):
        for s in range(bounds.size - 1):
            for k in range(bounds[s], bounds[s + 1], 8):
                count = min(8, bounds[s + 1] - k)
                for r in range(8):
                    store8(packed, to, load8n(x, min(group + r, rows - 1) * inputs + k, count))
                    to += 8


@kernel
def _widen(w, n, last, inputs, k, count, wide):
    """wide[8, CHUNK]: `count` inputs from `k` of outputs n … n + 7, in fp32."""
    whole = count & ~15
    for j in range(min(8, last - n)):
        start, to = (n + j) * inputs + k, j * CHUNK
        for i in range(0, whole, 16):
            store16(wide, to + i, load16(w, start + i))
        for i in range(whole, count):
            store1(wide, to + i, load1(w, start + i))


@kernel
def _chunk8x4(packed, x0, depth, rows, v, v0, stride, outputs, count, first, last, carry, sums, to, w, next_w, inputs):
    """A chunk of eight outputs for all rows of a packed panel, in 8 × 4 tiles; v is w, or w widened."""
    end, tiles, ask = v0 + (outputs - 1) * stride, (rows + 7) // 8 * 2, next_w
    streams = (8 + tiles - 1) // tiles
    for row in range(0, rows, 8):
        for j in range(0, outputs, 4):
            u0 = v0 + j * stride
            u1, u2, u3 = min(u0 + stride, end), min(u0 + 2 * stride, end), min(u0 + 3 * stride, end)
            streams = streams if ask < next_w + 8 * inputs else 0
            tile8x4(
                packed,
                x0 + row * depth,
                v,
                u0,
                u1,
                u2,
                u3,
                count,
                first,
                last,
                carry,
                (row + j) * 64,
                sums,
                to + row * 8 + j,
                8,
                w,
                ask,
                inputs,
                streams,
            )
            ask += streams * inputs


@kernel
def _chunk4x3(x, x0, rows, v, v0, stride, outputs, count, first, last, carry, sums, to, w, next_w, inputs):
    """The same in tiles of 4 × 3, 4 × 3 and 4 × 2, straight from x."""
    end, tile, tiles = x0 + (rows - 1) * inputs, 0, (rows + 3) // 4 * 3
    o1, o2 = min(1, outputs - 1) * stride, min(2, outputs - 1) * stride
    o3, o4 = min(3, outputs - 1) * stride, min(4, outputs - 1) * stride
    o5, o6, o7 = min(5, outputs - 1) * stride, min(6, outputs - 1) * stride, min(7, outputs - 1) * stride
    for row in range(0, rows, 4):
        r0 = x0 + row * inputs
        r1, r2, r3 = min(r0 + inputs, end), min(r0 + 2 * inputs, end), min(r0 + 3 * inputs, end)
        _prefetch(w, next_w, inputs, count, tile, tiles)
        tile4x3(x, r0, r1, r2, r3, v, v0, v0 + o1, v0 + o2, count, first, last, carry, row * 64, sums, to + row * 8, 8)
        if outputs > 3:
            _prefetch(w, next_w, inputs, count, tile + 1, tiles)
            tile4x3(
                x,
                r0,
                r1,
                r2,
                r3,
                v,
                v0 + o3,
                v0 + o4,
                v0 + o5,
                count,
                first,
                last,
                carry,
                row * 64 + 96,
                sums,
                to + row * 8 + 3,
                8,
            )
        if outputs > 6:
            _prefetch(w, next_w, inputs, count, tile + 2, tiles)
            tile4x2(
                x,
                r0,
                r1,
                r2,
                r3,
                v,
                v0 + o6,
                v0 + o7,
                count,
                first,
                last,
                carry,
                row * 64 + 192,
                sums,
                to + row * 8 + 6,
                8,
            )
        tile += 3


@kernel
def _many(x, row, rows, inputs, packed, p, depth, w, n, last, bounds, wide, carry, sums, to, shard_sums):
    """Sums of the `rows` rows of a panel from `row`, packed from packed[p], by outputs n … n + 7.

    Those of the first shard go to sums[to …], those of the next ones `shard_sums` further on.
    """
    outputs = min(8, last - n)
    for s in range(bounds.size - 1):
        k, end = bounds[s], bounds[s + 1]
        first, last_chunk = True, False
        while not last_chunk:  # an empty shard is one empty chunk, whose sums are 0
            count, w0 = min(CHUNK, end - k), n * inputs + k
            last_chunk = k + count == end
            v0, stride = w0, inputs
            if narrow(w):
                _widen(w, n, last, inputs, k, count, wide)
                v0, stride = 0, CHUNK
            v, next_w = widest(w, wide), w0 + 8 * inputs
            if WIDE:
                _chunk8x4(
                    packed,
                    p,
                    depth,
                    rows,
                    v,
                    v0,
                    stride,
                    outputs,
                    count,
                    first,
                    last_chunk,
                    carry,
                    sums,
                    to,
                    w,
                    next_w,
                    inputs,
                )
            else:
                _chunk4x3(
                    x,
                    row * inputs + k,
                    rows,
                    v,
                    v0,
                    stride,
                    outputs,
                    count,
                    first,
                    last_chunk,
                    carry,
                    sums,
                    to,
                    w,
                    next_w,
                    inputs,
                )
            p += (count + 7) // 8 * 64
            k += count
            first = False
        to += shard_sums


@kernel
def _panels(x, rows, inputs, w, width, bias, bounds, y, worker, workers):
    """This worker's run of the tasks of many rows."""
    shards, depth, longest = bounds.size - 1, 0, 0
    for s in range(shards):
        depth += (bounds[s + 1] - bounds[s] + 7) // 8 * 8
        longest = max(longest, bounds[s + 1] - bounds[s])
    groups = (rows + 7) // 8
    count = (groups * 8 * inputs + PANEL - 1) // PANEL
    panel = (groups + count - 1) // count * 8
    count = (rows + panel - 1) // panel
    packed, x_start = scratch(panel * depth if WIDE else 0)
    sums, wide = np.empty(shards * panel * BLOCK, np.float32), np.empty(8 * CHUNK if narrow(w) else 0, np.float32)
    carry = np.empty(panel * 64 if longest > CHUNK else 0, np.float32)
    blocks, held = (width + BLOCK - 1) // BLOCK, -1
    for task in range(count * blocks * worker // workers, count * blocks * (worker + 1) // workers):
        row, first = task // blocks * panel, task % blocks * BLOCK
        stop, last = min(row + panel, rows), min(first + BLOCK, width)
        if WIDE and row != held:
            _pack(pointer(x), row, stop, inputs, bounds, pointer(packed), x_start)
            held = row
        shard_sums = (last - first + 7) // 8 * panel * 8
        for n in range(first, last, 8):
            _many(
                pointer(x),
                row,
                stop - row,
                inputs,
                pointer(packed),
                x_start,
                depth,
                pointer(w),
                n,
                last,
                bounds,
                pointer(wide),
                pointer(carry),
                pointer(sums),
                (n - first) * panel,
                shard_sums,
            )
        _finish(pointer(sums), shards, panel * 8, row, stop - row, first, last, width, bias, pointer(y))


# ---- the whole product -----------------------------------------------------------------------------------------


@kernel
def linear_part(x, rows, inputs, w, width, bias, bounds, y, worker, workers):
    """The share of `worker` (of `workers`) in `linear`. With (0, 1) it is all of it, on the calling thread."""
    if rows >= MANY:
        _panels(x, rows, inputs, w, width, bias, bounds, y, worker, workers)
        return
    eights = (width + 7) // 8
    first, last = eights * worker // workers * 8, min(eights * (worker + 1) // workers * 8, width)
    sums = np.empty((bounds.size - 1) * 32, np.float32)
    _few(pointer(x), 0, rows, inputs, pointer(w), first, last, width, bias, bounds, sums, pointer(y))


@kernel(parallel=True)
def linear(x, rows, inputs, w, width, bias, bounds, y, workers):
    """y[rows, width] = x[rows, inputs] @ w[width, inputs].T + bias; all contiguous, x and y fp32.

    `bias` is fp32 [width], or empty for none. `bounds` is int64 [V + 1] from 0 to `inputs`.
    """
    for worker in prange(workers):  # whose index is unsigned: uncast, it would compile everything below once more
        linear_part(x, rows, inputs, w, width, bias, bounds, y, np.int64(worker), workers)
