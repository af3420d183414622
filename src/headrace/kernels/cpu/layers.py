"""The blocks of a model that serves, in one compiled call: each stage is the kernel of the single operation.

A step goes through the stages of one half block after another: norm, qkv, rotary and store, attention, o; then norm,
gate and up, silu, down. A thread takes a stage's tasks by its *ticket*, then waits until all of them are *done*; one
that comes late finds no ticket left and goes on. So there is no barrier: one thread alone gets through, and which
thread computes what changes no bits. Adding to `done` releases what a task has written, and reading it acquires that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from headrace.kernels.cpu.attention import AttentionInput, attend, tiles_of
from headrace.kernels.cpu.elementwise import (
    add_rms_norm_rows,
    rms_norm_rows,
    rotary_rows,
    share,
    silu_mul_rows,
    store_kv_rows,
)
from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import beyond, pointer, pointer_at
from headrace.kernels.cpu.packing import Matrix
from headrace.kernels.cpu.pool import arrive, await_total
from headrace.kernels.cpu.product import LANES, tasks_of, work
from headrace.kernels.cpu.work import take

__all__ = ["FIELDS", "WINDOW", "Chunks", "PagedRows", "Shape", "buffers", "counters", "run_layers"]

FIELDS = 13
(
    INPUT_NORM,
    QKV,
    QKV_BIAS,
    Q_NORM,
    K_NORM,
    OUT,
    OUT_BIAS,
    MLP_NORM,
    GATE_UP,
    GATE_UP_BIAS,
    DOWN,
    DOWN_BIAS,
    WINDOW,
) = range(FIELDS)
"""A layer's row of the table, in the order of `LayerWeights`: addresses, 0 where there is none, and its window."""
STAGES = 5
"""Of half a block, at most."""
APART = 128
"""Bytes between counters, which different threads change."""


class Shape(NamedTuple):
    """What all layers have in common."""

    width: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    """Columns of gate, and of up."""
    eps: Any
    scale: Any
    panels: bool
    """Whether matrices are panels, not rows."""


class Chunks(NamedTuple):
    """`product`'s chunks and levels of the sums over the model's width, over heads and over the inner columns."""

    width: Any
    width_levels: int
    out: Any
    out_levels: int
    down: Any
    down_levels: int


class _Step(NamedTuple):
    """One thread's view of a step: buffers of T rows, counters, and what the kernels need."""

    rows: int
    shape: Any
    chunks: Any
    x: Any
    residual: Any
    normed: Any
    qkv: Any
    q: Any
    k: Any
    attended: Any
    gate_up: Any
    inner: Any
    weight: Any
    """Some pointer to elements of the matrices' dtype."""
    counters: int
    sleepers: int
    threads: int
    cache: Any
    """The cache's shape, [block, layer, 2, kv_head, token, dim]; `PagedRows.blocks` holds its elements flattened."""


class PagedRows(NamedTuple):
    """The cache, where each row is in it and what it sees."""

    positions: Any
    """[T] int64."""
    slots: Any
    """[T] int32."""
    rope: Any
    blocks: Any
    table_SM: Any
    start_S1: Any
    context_S: Any


def counters(halves: int) -> int:
    """int64 elements that `run_layers` counts in, zero at first: a ticket and a done for every stage, and sleepers."""
    return (2 * halves * STAGES + 2) * APART // 8


@kernel
def buffers(rows, shape):
    """Where each buffer of a step begins in the room, in elements, and how many elements they need."""
    width, columns = shape.width, (shape.heads + 2 * shape.kv_heads) * shape.dim
    ends = np.zeros(10, np.int64)
    sizes = (
        width,
        width,
        width,
        columns,
        shape.heads * shape.dim,
        shape.kv_heads * shape.dim,
        shape.heads * shape.dim,
        2 * shape.inner,
        shape.inner,
    )
    for i in range(9):
        ends[i + 1] = ends[i] + (rows * sizes[i] + 15) // 16 * 16
    return ends


# ---- stages ----------------------------------------------------------------------------------------------------


@kernel
def _ticket(step, stage):
    return step.counters + 2 * stage * APART


@kernel
def _join(step, stage, did, tasks):
    """Wait until every task of a stage is done, of which this thread did some."""
    done = step.counters + (2 * stage + 1) * APART
    arrive(done, did, tasks, step.sleepers)
    await_total(done, tasks, step.sleepers)


@kernel
def _row_tasks(step):
    return min(step.rows, 4 * step.threads)


@kernel
def _norm(step, stage, address, starts):
    """normed = norm(x + residual) and residual += x; `starts`: the residual stream is x."""
    weight, width, eps, tasks, did = pointer_at(address, step.x), step.shape.width, step.shape.eps, _row_tasks(step), 0
    task = take(_ticket(step, stage))
    while task < tasks:
        first, last = share(step.rows, task, tasks), share(step.rows, task + 1, tasks)
        if starts:
            rms_norm_rows(step.residual, weight, width, eps, step.normed, first, last)
        else:
            add_rms_norm_rows(step.x, step.residual, weight, width, eps, step.normed, step.residual, first, last)
        did += 1
        task = take(_ticket(step, stage))
    _join(step, stage, did, tasks)


@kernel
def _product(step, stage, x, inputs, address, bias, y, outputs, chunks, levels):
    if step.shape.panels:
        right = Matrix(pointer_at(address, step.weight), LANES, 1, LANES * inputs)
    else:
        right = Matrix(pointer_at(address, step.weight), 1, inputs, LANES * inputs)
    did = work(
        Matrix(x, 1, inputs, 0),
        right,
        pointer_at(bias, step.x),
        bias != 0,
        y,
        step.rows,
        outputs,
        False,
        chunks,
        levels,
        step.threads,
        _ticket(step, stage),
    )
    _join(step, stage, did, tasks_of(step.rows, outputs, step.threads))


@kernel
def _rotary(step, stage, layer, row, paged):
    """Turned q and k of every row; k and v go into the cache."""
    heads, kv_heads, dim, eps = step.shape.heads, step.shape.kv_heads, step.shape.dim, step.shape.eps
    columns, tasks, did = (heads + 2 * kv_heads) * dim, _row_tasks(step), 0
    k, v = beyond(step.qkv, heads * dim), beyond(step.qkv, (heads + kv_heads) * dim)
    q_weight, k_weight = pointer_at(row[Q_NORM], step.x), pointer_at(row[K_NORM], step.x)
    normed, at, rope = row[Q_NORM] != 0, paged.positions, paged.rope
    task = take(_ticket(step, stage))
    while task < tasks:
        first, last = share(step.rows, task, tasks), share(step.rows, task + 1, tasks)
        rotary_rows(step.qkv, columns, dim, heads, dim, at, rope, q_weight, normed, eps, step.q, first, last)
        rotary_rows(k, columns, dim, kv_heads, dim, at, rope, k_weight, normed, eps, step.k, first, last)
        store_kv_rows(
            step.k, kv_heads * dim, dim, v, columns, dim, paged.blocks, step.cache, layer, paged.slots, first, last
        )
        did += 1
        task = take(_ticket(step, stage))
    _join(step, stage, did, tasks)


@kernel
def _attention(step, stage, layer, window, paged):
    tiles_S1 = tiles_of(paged.start_S1, step.shape.heads // step.shape.kv_heads)
    none, whole = np.empty(0, np.float32), np.empty((0, 2), np.int64)  # no log-sum-exp, no range of the context
    _, layers, _, kv_heads, block_size, dim = step.cache
    call = AttentionInput(
        step.q,
        paged.blocks,
        layers,
        kv_heads,
        block_size,
        dim,
        layer,
        paged.table_SM,
        paged.start_S1,
        paged.context_S,
        whole,
        step.shape.heads,
        step.attended,
        none,
        none,
        0,
        step.shape.scale,
        window,
    )
    did = attend(call, tiles_S1, _ticket(step, stage))
    _join(step, stage, did, tiles_S1[paged.context_S.size] * step.shape.kv_heads)


@kernel
def _silu(step, stage):
    tasks, did = _row_tasks(step), 0
    task = take(_ticket(step, stage))
    while task < tasks:
        first, last = share(step.rows, task, tasks), share(step.rows, task + 1, tasks)
        silu_mul_rows(step.gate_up, step.shape.inner, step.inner, first, last)
        did += 1
        task = take(_ticket(step, stage))
    _join(step, stage, did, tasks)


# ---- a step ----------------------------------------------------------------------------------------------------


@kernel
def _attention_half(step, stage, layer, row, paged):
    """residual += x, the last block's output, if there is one; x = attention of its norm."""
    shape, chunks = step.shape, step.chunks
    columns, heads, levels = (
        (shape.heads + 2 * shape.kv_heads) * shape.dim,
        shape.heads * shape.dim,
        chunks.width_levels,
    )
    _norm(step, stage, row[INPUT_NORM], layer == 0)
    _product(
        step, stage + 1, step.normed, shape.width, row[QKV], row[QKV_BIAS], step.qkv, columns, chunks.width, levels
    )
    _rotary(step, stage + 2, layer, row, paged)
    _attention(step, stage + 3, layer, row[WINDOW], paged)
    out, levels = chunks.out, chunks.out_levels
    _product(step, stage + 4, step.attended, heads, row[OUT], row[OUT_BIAS], step.x, shape.width, out, levels)


@kernel
def _mlp_half(step, stage, row):
    """residual += x; x = down(silu(gate) · up) of its norm."""
    shape, chunks, levels = step.shape, step.chunks, step.chunks.width_levels
    gate_up, bias, inner = row[GATE_UP], row[GATE_UP_BIAS], shape.inner
    _norm(step, stage, row[MLP_NORM], False)
    _product(step, stage + 1, step.normed, shape.width, gate_up, bias, step.gate_up, 2 * inner, chunks.width, levels)
    _silu(step, stage + 2)
    down, levels = chunks.down, chunks.down_levels
    _product(step, stage + 3, step.inner, inner, row[DOWN], row[DOWN_BIAS], step.x, shape.width, down, levels)


@kernel
def _thread(table, first, last, room, weight, rows, shape, chunks, paged, cache, counted, threads):
    """One thread's way through a step."""
    at, base, start = buffers(rows, shape), pointer(room), counted.ctypes.data
    step = _Step(
        rows,
        shape,
        chunks,
        base,
        beyond(base, at[1]),
        beyond(base, at[2]),
        beyond(base, at[3]),
        beyond(base, at[4]),
        beyond(base, at[5]),
        beyond(base, at[6]),
        beyond(base, at[7]),
        beyond(base, at[8]),
        pointer(weight),
        start + APART,
        start,
        threads,
        cache,
    )
    for half in range(first, last):
        layer, stage = half // 2, (half - first) * STAGES
        if half % 2 == 0:
            _attention_half(step, stage, layer, table[layer], paged)
        else:
            _mlp_half(step, stage, table[layer])


@kernel(parallel=True)
def run_layers(table, first, last, room, weight, rows, shape, chunks, paged, cache, counted, threads):
    """Compute halves first … last − 1 of blocks for `rows` rows: of layer i, 2·i is attention and 2·i + 1 the MLP.

    `room`, fp32, holds the rows' x and residual; `buffers` says where. table, int64 [layers, FIELDS]; weight, an array
    of the matrices' dtype; counted, `counters` zeros. The caller has checked `paged`. Before layer 0 the rows' x lies
    where the residual does.
    """
    for _ in prange(threads):
        _thread(table, first, last, room, weight, rows, shape, chunks, paged, cache, counted, threads)
