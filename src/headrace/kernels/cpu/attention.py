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

Rows of one kv head, (token, head of the group) in this order, are taken up to ROWS at a time, so one read of K and V
serves a whole group, or several tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import get_num_threads, prange

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import beyond, load1, pointer, store1
from headrace.kernels.cpu.partial import NODES, ROWS, Paged, partial, prefetch_from, room_for
from headrace.kernels.cpu.tiles import LANES
from headrace.kernels.cpu.tree import finish, give, insert, last_start, levels_of, oldest_split
from headrace.kernels.cpu.work import scratch, take
from headrace.kernels.partials import SPLIT

__all__ = ["WHOLE", "AttentionInput", "Result", "attend", "attention", "tiles_of"]

TILE = 64  # rows of a work item: K and V of a split stay in the cache between its groups of rows

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


class AttentionInput(NamedTuple):
    """What one call reads, then the fields of its `Result`: a parallel kernel takes no tuple in a tuple."""

    q: Any
    """[T, H, d] fp32, contiguous."""
    blocks: Any
    """The cache [block, layer, 2, kv_head, token, d], flattened."""
    layers: int
    kv_heads: int
    block_size: int
    dim: int
    layer: int
    table_SM: Any
    start_S1: Any
    context_S: Any
    range_S2: Any
    heads: int
    out: Any
    m: Any
    e: Any
    nodes: int
    scale: Any
    window: int


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
def _pack(q, item, dim, room):
    """An item's queries, a group of ROWS rows after another, for each element of the head the rows."""
    for row in range(item.tokens * item.group):
        to = room.queries + row // ROWS * ROWS * dim + row % ROWS
        at = ((item.token + row // item.group) * item.heads + item.head + row % item.group) * dim
        for c in range(dim):
            store1(room.at, to + c * ROWS, load1(q, at + c))


@kernel
def _tile(q, paged, item, scale, room, stacks, levels):
    """Leave the nodes of an item's rows in their counters, which begin at `stacks`, split by split."""
    rows, window, position_R = item.tokens * item.group, item.window, np.empty(ROWS, np.int64)
    slots = 2 * levels if item.first else levels
    last = min(item.last, (paged.last - 1) // SPLIT + 1)
    oldest = max(item.first * SPLIT, item.position - window + 1 if window else 0)
    prefetch_from(paged, oldest & -LANES)
    _pack(q, item, paged.dim, room)
    for split in range(oldest // SPLIT, last):
        turned = 0
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            for r in range(ROWS):
                position_R[r] = item.position + (row + min(r, count - 1)) // item.group
            if position_R[ROWS - 1] < split * SPLIT or oldest_split(position_R[0], window) > split:
                continue
            queries = room.queries + row * paged.dim
            turned = partial(queries, position_R, count, paged, split, window, turned, scale, room)
            for r in range(count):
                oldest = oldest_split(position_R[r], window)
                if oldest <= split and split * SPLIT <= position_R[r]:
                    stack = stacks + (row + r) * slots * room.node
                    begin = item.first if item.first > oldest else 0
                    insert(room.at, NODES + r * room.node, stack, split, 0, begin, oldest, levels, room.node)


@kernel
def _write(call, item, room, stacks, levels):
    """Write the results of an item's rows, whose nodes `_tile` has left in the counters."""
    slots = 2 * levels if item.first else levels
    for row in range(item.tokens * item.group):
        at = item.position + row // item.group
        place = (item.token + row // item.group) * item.heads + item.head + row % item.group
        stack = stacks + row * slots * room.node
        if call.nodes:
            to, window, node, out, m, e = place * call.nodes, item.window, room.node, call.out, call.m, call.e
            give(room.at, stack, at, window, item.first, item.last, levels, node, call.dim, out, m, e, to)
        else:
            oldest, to = oldest_split(at, item.window), place * call.dim
            finish(room.at, stack, at // SPLIT + 1, oldest, room.node, call.out, to, call.dim, call.m)


@kernel
def _tile_tokens(group):
    return max(1, TILE // group)


@kernel
def tiles_of(start_S1, group):
    """Where each sequence's tiles of rows begin, and how many there are, [S + 1]."""
    tile, tiles_S1 = _tile_tokens(group), np.zeros(start_S1.size, np.int64)
    for s in range(start_S1.size - 1):
        tiles_S1[s + 1] = tiles_S1[s] + (start_S1[s + 1] - start_S1[s] + tile - 1) // tile
    return tiles_S1


@kernel
def attend(call, tiles_S1, counter):
    """One thread's work: it takes items, (kv head, sequence, tile of rows), until none is left. Returns how many."""
    group, longest = call.heads // call.kv_heads, np.int64(1)
    for s in range(call.context_S.size):
        longest = max(longest, np.int64(call.start_S1[s + 1] - call.start_S1[s]))
    levels, rows = levels_of(call.context_S), min(longest, _tile_tokens(group)) * group
    sizes, stacks = room_for(pointer(call.q), rows, call.dim)
    slots = 2 * levels if call.range_S2.size else levels
    room, aligned = scratch(stacks + rows * slots * sizes.node)
    return _items(call, tiles_S1, counter, room, aligned, rows, levels)


@kernel
def _items(call, tiles_S1, counter, at, aligned, rows, levels):
    """`attend` with its workspace as an argument, since a local array is freed after its last use."""
    layers, kv_heads, dim = call.layers, call.kv_heads, call.dim
    sequences, group = call.context_S.size, call.heads // kv_heads
    tile = _tile_tokens(group)
    room, stacks = room_for(beyond(pointer(at), aligned), rows, dim)
    shift = 0
    while 1 << shift < call.block_size:
        shift += 1
    part = kv_heads * call.block_size * dim
    items, did = tiles_S1[sequences] * kv_heads, 0
    item = take(counter)
    while item < items:
        head, index = item // tiles_S1[sequences], item % tiles_S1[sequences]
        s = last_start(tiles_S1, index)
        start, end = np.int64(call.start_S1[s]), np.int64(call.start_S1[s + 1])
        token = start + (tiles_S1[s + 1] - 1 - index) * tile  # the last tile, which sees most, goes first
        tokens, position = min(tile, end - token), call.context_S[s] - (end - token)
        first, last = (call.range_S2[s, 0], call.range_S2[s, 1]) if call.range_S2.size else (0, position + tokens)
        keys = (2 * call.layer * kv_heads + head) * call.block_size * dim
        blocks, table_M, last_key = pointer(call.blocks), call.table_SM[s], position + tokens
        paged = Paged(blocks, table_M, 2 * layers * part, keys, part, shift, dim, last_key)
        own = Rows(token, tokens, position, call.heads, head * group, group, call.window, first, last)
        _tile(call.q, paged, own, call.scale, room, stacks, levels)
        _write(call, own, room, stacks, levels)
        did += 1
        item = take(counter)
    return did


@kernel(parallel=True)
def _attention(call, threads):
    """Every item; a free thread takes the next one."""
    tiles_S1, counter = tiles_of(call.start_S1, call.heads // call.kv_heads), np.zeros(1, np.int64)
    items = tiles_S1[call.context_S.size] * call.kv_heads
    for _ in prange(max(1, min(threads, items))):
        attend(call, tiles_S1, counter.ctypes.data)


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
    _, layers, _, kv_heads, block_size, dim = blocks.shape
    call = AttentionInput(
        q_THd,
        blocks.reshape(-1),
        layers,
        kv_heads,
        block_size,
        dim,
        layer,
        block_table_SM,
        query_start_S1,
        context_len_S,
        range_S2,
        q_THd.shape[1],
        *result,
        np.float32(scale),
        window,
    )
    _attention(call, get_num_threads())
