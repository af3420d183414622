"""Paged attention on the CPU, straight from the block table (PagedAttention §4.3), under one law for sums.

A row's keys are cut into splits of 256 positions, aligned to position 0 of its sequence. A split gives a partial
(MA, m, e), Infinite-LLM's names, over the keys that the row sees:

    score_j = scale · hsum8(8-lane FMA dot of q and k_j)        m  = max score_j
    p_j     = exp(score_j − m)                                  e  = hsum8 of lanes j mod 8
    MA      = Σ p_j · v_j, one FMA a key, keys ascending

Partials are merged in a binary tree of nodes aligned to powers of two; the maximal nodes then join left to right.
A split without a visible key is no node at all. So the bits of a row depend on its position, its window and what
it sees: not on chunking, neighbours, block size or threads. A key that a row does not see is never multiplied
into it, not even by 0, so whatever lies there (NaN too) stays out.

Rows of one kv head, (token, head of the group) in this order, are taken four or eight at a time, so one read of K
and V serves a whole group, or several tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import get_num_threads, prange

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.partial import NODES, ROWS, Paged, locate, partial
from headrace.kernels.cpu.tree import finish, give, insert, last_start, levels_of, oldest_split
from headrace.kernels.cpu.work import take
from headrace.kernels.partials import SPLIT

__all__ = ["WHOLE", "Result", "attend", "attention", "tiles_of"]

TILE = 32  # rows of a work item: K and V of a split stay in the cache between its groups of rows

WHOLE = np.empty((0, 2), np.int64)
"""Ranges of sequences whose whole context is here."""


class Result(NamedTuple):
    """Where the rows' results go, flat: MA / e and m + log e (none where empty), or their nodes."""

    out: Any
    """[T, H, d], or MA [T, H, nodes, d]."""
    m: Any
    """The log-sum-exp [T, H], or m [T, H, nodes]."""
    e: Any
    nodes: int
    """Nodes that a row has room for; 0 where rows are finished here."""


class Rows(NamedTuple):
    """A work item: all heads of one group for some tokens in a row, over the splits first … last − 1."""

    token: int
    tokens: int
    position: int
    """Of the first token."""
    heads: int
    """Of the model; `group` of them, from `head` on, are these rows' own."""
    head: int
    group: int
    window: int
    first: int
    last: int


@kernel
def _tile(q, paged, item, scale, scratch, packed, node, levels):
    """Leave the nodes of an item's rows in their counters, split by split."""
    token, tokens, position, heads, head, group, window, first, last = item
    rows, at_R, position_R = tokens * group, np.empty(ROWS, np.int64), np.empty(ROWS, np.int64)
    stacks, slots = NODES + ROWS * node, 2 * levels if first else levels
    last = min(last, (position + tokens - 1) // SPLIT + 1)
    for split in range(max(first, oldest_split(position, window)), last):
        oldest = max(0, position - window + 1) if window else 0
        locate(paged, max(split * SPLIT, oldest), min((split + 1) * SPLIT, position + tokens))
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            for r in range(ROWS):
                index = row + min(r, count - 1)
                at_R[r] = ((token + index // group) * heads + head + index % group) * paged.dim
                position_R[r] = position + index // group
            if position_R[ROWS - 1] < split * SPLIT or oldest_split(position_R[0], window) > split:
                continue
            partial(q, at_R, position_R, count, paged, split, window, row == 0, scale, scratch, packed, node)
            for r in range(count):
                oldest = oldest_split(position_R[r], window)
                if oldest <= split and split * SPLIT <= position_R[r]:
                    stack = stacks + (row + r) * slots * node
                    begin = first if first > oldest else 0
                    insert(scratch, NODES + r * node, stack, split, 0, begin, oldest, levels, node)


@kernel
def _write(result, item, scratch, node, levels, dim):
    """What `_tile` has left in the counters."""
    token, tokens, position, heads, head, group, window, first, last = item
    slots = 2 * levels if first else levels
    for row in range(tokens * group):
        at, place = position + row // group, (token + row // group) * heads + head + row % group
        stack = NODES + ROWS * node + row * slots * node
        if result.nodes:
            to = place * result.nodes
            give(scratch, stack, at, window, first, last, levels, node, dim, result.out, result.m, result.e, to)
        else:
            oldest = oldest_split(at, window)
            finish(scratch, stack, at // SPLIT + 1, oldest, node, result.out, place * dim, dim, result.m)


@kernel
def tiles_of(start_S1, group):
    """Where each sequence's tiles of rows begin, and how many there are, [S + 1]."""
    tile, tiles_S1 = max(1, TILE // group), np.zeros(start_S1.size, np.int64)
    for s in range(start_S1.size - 1):
        tiles_S1[s + 1] = tiles_S1[s] + (start_S1[s + 1] - start_S1[s] + tile - 1) // tile
    return tiles_S1


@kernel
def attend(
    q,
    blocks,
    shape,
    layer,
    table_SM,
    start_S1,
    context_S,
    range_S2,
    heads,
    out,
    m,
    e,
    nodes,
    scale,
    window,
    tiles_S1,
    counter,
):
    """One thread's work: it takes items, (kv head, sequence, tile of rows), until none is left. Returns how many."""
    _, layers, _, kv_heads, block_size, dim = shape
    sequences, group = context_S.size, heads // kv_heads
    tile = max(1, TILE // group)
    levels, node = levels_of(context_S), (dim + 7) // 8 * 8 + 8
    slots = 2 * levels if range_S2.size else levels
    shift = 0
    while 1 << shift < block_size:
        shift += 1
    part = kv_heads * block_size * dim
    items, did = tiles_S1[sequences] * kv_heads, 0
    scratch = np.empty(NODES + ROWS * node + tile * group * slots * node, np.float32)
    packed, at_K = np.empty((dim + 7) // 8 * 64, np.float32), np.empty(SPLIT, np.int64)
    item = take(counter)
    while item < items:
        head, index = item // tiles_S1[sequences], item % tiles_S1[sequences]
        s = last_start(tiles_S1, index)
        start, end = np.int64(start_S1[s]), np.int64(start_S1[s + 1])
        token = start + (tiles_S1[s + 1] - 1 - index) * tile  # the last tile, which sees most, goes first
        tokens, position = min(tile, end - token), context_S[s] - (end - token)
        first, last = (range_S2[s, 0], range_S2[s, 1]) if range_S2.size else (0, position + tokens)
        keys = (2 * layer * kv_heads + head) * block_size * dim
        paged = Paged(blocks, table_SM[s], 2 * layers * part, keys, part, shift, dim, at_K)
        rows = Rows(token, tokens, position, heads, head * group, group, window, first, last)
        _tile(q, paged, rows, scale, scratch, packed, node, levels)
        _write(Result(out, m, e, nodes), rows, scratch, node, levels, dim)
        did += 1
        item = take(counter)
    return did


@kernel(parallel=True)
def _attention(
    q,
    blocks,
    shape,
    layer,
    table_SM,
    start_S1,
    context_S,
    range_S2,
    heads,
    out,
    m,
    e,
    nodes,
    scale,
    window,
    threads,
):
    """Every item; a free thread takes the next one."""
    tiles_S1, counter = tiles_of(start_S1, heads // shape[3]), np.zeros(1, np.int64)
    items = tiles_S1[context_S.size] * shape[3]
    for _ in prange(max(1, min(threads, items))):
        attend(
            q,
            blocks,
            shape,
            layer,
            table_SM,
            start_S1,
            context_S,
            range_S2,
            heads,
            out,
            m,
            e,
            nodes,
            scale,
            window,
            tiles_S1,
            counter.ctypes.data,
        )


def attention(
    q_THd: np.ndarray,
    blocks: np.ndarray,
    layer: int,
    block_table_SM: np.ndarray,
    query_start_S1: np.ndarray,
    context_len_S: np.ndarray,
    range_S2: np.ndarray,
    result: Result,
    scale: float,
    window: int,
) -> None:
    """See `Ops.attention` and `Ops.attention_partials`; ranges are int64 and count splits.

    All arrays are C-contiguous; `blocks` [block, layer, 2, kv_head, token, dim] is float32, uint16 (bf16) or int16
    (fp16), the meta arrays are int32, q fp32 [T, H, d].
    """
    _attention(
        q_THd,
        blocks.reshape(-1),
        blocks.shape,
        layer,
        block_table_SM,
        query_start_S1,
        context_len_S,
        range_S2,
        q_THd.shape[1],
        *result,
        np.float32(scale),
        window,
        get_num_threads(),
    )
