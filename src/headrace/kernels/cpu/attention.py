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

import numpy as np
from numba import get_num_threads, prange

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import load1, load8, store1, store8, store8n
from headrace.kernels.cpu.partial import NODES, ROWS, Paged, locate, partial
from headrace.kernels.cpu.simd import div8, exp1, fma8, log1, mul8, splat8
from headrace.kernels.cpu.work import take
from headrace.kernels.ops import SPLIT

__all__ = ["attention", "merge"]

TILE = 32  # rows of a work item: K and V of a split stay in the cache between its groups of rows


# ---- the tree of partials -------------------------------------------------------------------------------------


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
def _finish(scratch, stack, splits, oldest, node, out, at, dim, lse):
    """Join a row's maximal nodes left to right and write MA / e, and m + log e where it is asked for."""
    result, covered, level = -1, 0, 62
    while level >= 0:
        if (splits >> level) & 1:
            covered += 1 << level
            if covered > oldest:
                if result >= 0:
                    merge(scratch, result, stack + level * node, node)
                result = stack + level * node
        level -= 1
    if lse.size:
        lse[at // dim] = load1(scratch, result + node - 2) + log1(load1(scratch, result + node - 1))
    e = splat8(load1(scratch, result + node - 1))
    for c in range(0, dim & ~7, 8):
        store8(out, at + c, div8(load8(scratch, result + c), e))
    if dim & 7:
        c = dim & ~7
        store8n(out, at + c, div8(load8(scratch, result + c), e), dim & 7)


# ---- work items ------------------------------------------------------------------------------------------------


@kernel
def _tile(
    q, paged, token, tokens, position, heads, head, group, window, scale, scratch, packed, node, levels, out, lse
):
    """All heads of one group for `tokens` tokens in a row, the first of them at `position`: split by split."""
    rows, at_R, position_R = tokens * group, np.empty(ROWS, np.int64), np.empty(ROWS, np.int64)
    stacks = NODES + ROWS * node
    for split in range(_oldest(position, window), (position + tokens - 1) // SPLIT + 1):
        oldest = max(0, position - window + 1) if window else 0
        locate(paged, max(split * SPLIT, oldest), min((split + 1) * SPLIT, position + tokens))
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            for r in range(ROWS):
                index = row + min(r, count - 1)
                at_R[r] = ((token + index // group) * heads + head + index % group) * paged.dim
                position_R[r] = position + index // group
            if position_R[ROWS - 1] < split * SPLIT or _oldest(position_R[0], window) > split:
                continue
            partial(q, at_R, position_R, count, paged, split, window, row == 0, scale, scratch, packed, node)
            for r in range(count):
                oldest = _oldest(position_R[r], window)
                if oldest <= split and split * SPLIT <= position_R[r]:
                    stack = stacks + (row + r) * levels * node
                    _insert(scratch, NODES + r * node, stack, split, oldest, node)
    for row in range(rows):
        at, place = position + row // group, ((token + row // group) * heads + head + row % group) * paged.dim
        stack = stacks + row * levels * node
        _finish(scratch, stack, at // SPLIT + 1, _oldest(at, window), node, out, place, paged.dim, lse)


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
def _attention(q, blocks, shape, layer, table_SM, query_start_S1, context_S, heads, out, lse, scale, window, threads):
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
        packed, at_K = np.empty((dim + 7) // 8 * 64, np.float32), np.empty(SPLIT, np.int64)
        item = take(counter)
        while item < items:
            head, index = item // tiles_S1[sequences], item % tiles_S1[sequences]
            s = _last_start(tiles_S1, index)
            start, end = np.int64(query_start_S1[s]), np.int64(query_start_S1[s + 1])
            first = start + (tiles_S1[s + 1] - 1 - index) * tile  # the last tile, which sees most, goes first
            keys = (2 * layer * kv_heads + head) * block_size * dim
            paged = Paged(blocks, table_SM[s], 2 * layers * part, keys, part, shift, dim, at_K)
            _tile(
                q,
                paged,
                first,
                min(tile, end - first),
                context_S[s] - (end - first),
                heads,
                head * group,
                group,
                window,
                scale,
                scratch,
                packed,
                node,
                levels,
                out,
                lse,
            )
            item = take(counter)


def attention(
    q_THd: np.ndarray,
    blocks: np.ndarray,
    layer: int,
    block_table_SM: np.ndarray,
    query_start_S1: np.ndarray,
    context_len_S: np.ndarray,
    out_THd: np.ndarray,
    lse_TH: np.ndarray,
    scale: float,
    window: int = 0,
) -> None:
    """See `Ops.attention`. All arrays are C-contiguous; `blocks` [block, layer, 2, kv_head, token, dim] is float32,
    uint16 (bf16) or int16 (fp16), the meta arrays are int32, q and out fp32 [T, H, d]; an empty lse is not written.
    """
    _attention(
        q_THd,
        blocks.reshape(-1),
        blocks.shape,
        layer,
        block_table_SM,
        query_start_S1,
        context_len_S,
        q_THd.shape[1],
        out_THd,
        lse_TH.reshape(-1),
        np.float32(scale),
        window,
        get_num_threads(),
    )
