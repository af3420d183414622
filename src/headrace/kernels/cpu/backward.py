"""Gradients of the row-wise operations on the CPU, and dropout.

The sum over rows behind a norm weight's gradient has one shape. Everything else is element by element, and the tail of
a row does the same arithmetic as whole vectors. Arrays, offsets and `tasks` are as in
`elementwise`; shape suffixes are those of `headrace.kernels.ops`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from headrace.kernels.cpu.elementwise import inverse_rms, share
from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import load1, load8, load8n, store1, store8, store8n
from headrace.kernels.cpu.sample import STEP, mix
from headrace.kernels.cpu.simd import add8, div8, exp1, exp8, fma8, hsum8, mul8, splat8, sub8, zero8

__all__ = ["ROWS", "cross_entropy_backward", "dropout", "rms_norm_backward", "silu_mul_backward"]

ROWS = 64
"""Rows of one chunk of the sum behind a norm's weight."""


# ---- norms -----------------------------------------------------------------------------------------------------


@kernel
def _norm_row(g, x, start, width, weight, eps, out, sums, to):
    """out[start …] = (g·w − n·mean(g·w·n)) · r and sums[to …] += g·n, with r the inverse rms and n = x·r."""
    inverse = inverse_rms(x, start, width, eps)
    r, acc = splat8(inverse), zero8()
    tail = width & 7
    whole = width - tail
    for k in range(0, whole, 8):
        acc = fma8(mul8(load8(g, start + k), load8(weight, k)), mul8(load8(x, start + k), r), acc)
    if tail:
        at = start + whole
        acc = fma8(mul8(load8n(g, at, tail), load8n(weight, whole, tail)), mul8(load8n(x, at, tail), r), acc)
    along = splat8(-(hsum8(acc) / np.float32(width)))
    for k in range(0, whole, 8):
        u, n = load8(g, start + k), mul8(load8(x, start + k), r)
        store8(sums, to + k, fma8(u, n, load8(sums, to + k)))
        store8(out, start + k, mul8(fma8(n, along, mul8(u, load8(weight, k))), r))
    if tail:
        at = start + whole
        u, n = load8n(g, at, tail), mul8(load8n(x, at, tail), r)
        store8n(sums, to + whole, fma8(u, n, load8n(sums, to + whole, tail)), tail)
        store8n(out, at, mul8(fma8(n, along, mul8(u, load8n(weight, whole, tail))), r), tail)


@kernel
def _norm_chunks(g, x, width, weight, eps, chunks, out, sums, first, last):
    for c in range(first, last):
        for k in range(c * width, (c + 1) * width):
            store1(sums, k, np.float32(0))
        for t in range(chunks[c, 0], chunks[c, 1]):
            _norm_row(g, x, t * width, width, weight, eps, out, sums, c * width)


@kernel
def _add_chunks(sums, first, count, width, out, to):
    """out[to …] = the sum of `count` rows of `sums` from row `first`: a balanced tree, an odd one passing up."""
    if count == 0:
        for k in range(width):
            store1(out, to + k, np.float32(0))
        return
    start = first * width
    while count > 1:
        for i in range(count // 2):
            left, right = start + 2 * i * width, start + (2 * i + 1) * width
            for k in range(width):
                store1(sums, start + i * width + k, load1(sums, left + k) + load1(sums, right + k))
        if count & 1:
            for k in range(width):
                store1(sums, start + count // 2 * width + k, load1(sums, start + (count - 1) * width + k))
        count = (count + 1) // 2
    for k in range(width):
        store1(out, to + k, load1(sums, start + k))


@kernel(parallel=True)
def rms_norm_backward(g, x, width, weight, eps, chunks, shards, out, sums, out_weight, tasks):
    """Gradients of `rms_norm`: `out` by x, out_weight[shard, width] by the weight.

    Chunk c is rows chunks[c, 0] … chunks[c, 1] − 1, summed into sums[c, width]; shard s is chunks shards[s] …
    shards[s + 1] − 1.
    """
    count = len(chunks)
    if tasks == 1:
        _norm_chunks(g, x, width, weight, eps, chunks, out, sums, 0, count)
    else:
        for task in prange(tasks):
            _norm_chunks(
                g, x, width, weight, eps, chunks, out, sums, share(count, task, tasks), share(count, task + 1, tasks)
            )
    for s in range(len(shards) - 1):
        _add_chunks(sums, shards[s], shards[s + 1] - shards[s], width, out_weight, s * width)


# ---- SwiGLU ----------------------------------------------------------------------------------------------------


@kernel
def _silu_slopes(gate, up, g):
    """(gradient by gate, gradient by up). The silu has the forward's bits."""
    one = splat8(np.float32(1))
    below = add8(one, exp8(sub8(zero8(), gate)))
    silu, sigmoid = div8(gate, below), div8(one, below)
    slope = fma8(silu, sub8(one, sigmoid), sigmoid)
    return mul8(mul8(g, up), slope), mul8(g, silu)


@kernel
def _silu_mul_backward_rows(g, gate_up, width, out, first, last):
    tail = width & 7
    whole = width - tail
    for t in range(first, last):
        gate, up, at = 2 * t * width, 2 * t * width + width, t * width
        for k in range(0, whole, 8):
            by_gate, by_up = _silu_slopes(load8(gate_up, gate + k), load8(gate_up, up + k), load8(g, at + k))
            store8(out, gate + k, by_gate)
            store8(out, up + k, by_up)
        if tail:
            k = whole
            by_gate, by_up = _silu_slopes(
                load8n(gate_up, gate + k, tail), load8n(gate_up, up + k, tail), load8n(g, at + k, tail)
            )
            store8n(out, gate + k, by_gate, tail)
            store8n(out, up + k, by_up, tail)


@kernel(parallel=True)
def silu_mul_backward(g, gate_up, rows, width, out, tasks):
    """out[rows, 2·width] = the gradient by gate_up of Σ g · silu_mul(gate_up)."""
    if tasks == 1:
        _silu_mul_backward_rows(g, gate_up, width, out, 0, rows)
    else:
        for task in prange(tasks):
            _silu_mul_backward_rows(g, gate_up, width, out, share(rows, task, tasks), share(rows, task + 1, tasks))


# ---- the loss --------------------------------------------------------------------------------------------------


@kernel
def _cross_entropy_rows(logits, width, lse, targets, g, first, last):
    tail = width & 7
    whole = width - tail
    for r in range(first, last):
        start, scale, shift = r * width, splat8(g[r]), splat8(lse[r])
        own = start + np.int64(targets[r])
        z = load1(logits, own) if targets[r] >= 0 else np.float32(0)
        for k in range(start, start + whole, 8):
            store8(logits, k, mul8(scale, sub8(zero8(), exp8(sub8(load8(logits, k), shift)))))
        if tail:
            k = start + whole
            store8n(logits, k, mul8(scale, sub8(zero8(), exp8(sub8(load8n(logits, k, tail), shift)))), tail)
        if targets[r] >= 0:
            store1(logits, own, g[r] * (np.float32(1) - exp1(z - lse[r])))


@kernel(parallel=True)
def cross_entropy_backward(logits, rows, width, lse, targets, g, tasks):
    """logits[rows, width] ← g · ([v = target] − exp(z − lse)). Returns the first row whose target is not there, or -1.

    Target -1 is no column's.
    """
    for r in range(rows):
        if targets[r] < -1 or targets[r] >= width:
            return r
    if tasks == 1:
        _cross_entropy_rows(logits, width, lse, targets, g, 0, rows)
    else:
        for task in prange(tasks):
            _cross_entropy_rows(logits, width, lse, targets, g, share(rows, task, tasks), share(rows, task + 1, tasks))
    return -1


# ---- dropout ---------------------------------------------------------------------------------------------------


@kernel
def _dropout_row(key, x_D, bar, inverse, out_D):
    """Element j is kept where 31 bits of its hash reach `bar`. A plain loop, which vectorises."""
    for j in range(x_D.size):
        bits = np.int64(mix(key + np.uint64(j) * STEP) >> np.uint64(33))
        out_D[j] = x_D[j] * inverse if bits >= bar else np.float32(0)


@kernel
def _dropout_rows(x_TD, key, row_T, offset, bar, inverse, out_TD, first, last):
    key = mix(np.uint64(key) + STEP)
    for t in range(first, last):
        own = mix((key ^ np.uint64(row_T[t])) + STEP) + np.uint64(offset + 1) * STEP
        _dropout_row(own, x_TD[t], bar, inverse, out_TD[t])


@kernel(parallel=True)
def dropout(x_TD, key, row_T, offset, bar, inverse, out_TD, tasks):
    """out[t, j] = x[t, j] · inverse where the hash of (key, row_T[t], offset + j) reaches `bar` of 2³¹, else 0."""
    rows = len(x_TD)
    if tasks == 1:
        _dropout_rows(x_TD, key, row_T, offset, bar, inverse, out_TD, 0, rows)
    else:
        for task in prange(tasks):
            _dropout_rows(
                x_TD, key, row_T, offset, bar, inverse, out_TD, share(rows, task, tasks), share(rows, task + 1, tasks)
            )
