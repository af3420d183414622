"""The tree in which attention's partials are merged, the same for a row however its context is cut.

A *node* is the partial of 2^level splits, the first of which, `start`, is a multiple of 2^level: MA, then m and e.
Nodes are built in a row's *binary counter*: slot l of its stack holds a node of level l. Splits before `oldest` are
outside the row's window and a node of nothing but those does not exist.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import load1, load8, load8n, store1, store8, store8n
from headrace.kernels.cpu.simd import div8, exp1, fma8, log1, mul8, splat8
from headrace.kernels.partials import SPLIT

__all__ = ["finish", "fold", "give", "insert", "last_start", "levels_of", "merge", "most_nodes", "oldest_split"]


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
def oldest_split(position, window):
    """The first split of which the row at `position` sees something."""
    return max(0, position - window + 1) // SPLIT if window else 0


@kernel
def last_start(starts_S1, item):
    """The sequence s with starts_S1[s] ≤ item < starts_S1[s + 1]."""
    low, high = 0, starts_S1.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if starts_S1[middle] <= item:
            low = middle
        else:
            high = middle
    return low


@kernel
def levels_of(context_S):
    """Slots of the counter of the longest sequence: as many as its number of splits has bits."""
    longest, levels = 1, 1
    for s in range(context_S.size):
        longest = max(longest, context_S[s])
    while (longest + SPLIT - 1) // SPLIT >> levels:
        levels += 1
    return levels


@kernel
def _level(start, last):
    """The level of the largest node that begins at split `start` and ends by `last`."""
    level = 0
    while not (start >> level) & 1 and start + (2 << level) <= last:
        level += 1
    return level


@kernel
def insert(scratch, fresh, stack, start, level, first, oldest, levels, node):
    """Count the node at `fresh` into a row's counter, merging it with each left neighbour that is there.

    A neighbour that begins before split `first` belongs to another owner: the node then stays in slot levels + l.
    """
    slot = 0
    while (start >> level) & 1:
        begin = (start >> level) << level
        if begin > oldest:  # the neighbour's last split is the one before this
            if begin - (1 << level) < first:
                slot = levels
                break
            merge(scratch, stack + level * node, fresh, node)
        level += 1
    for c in range(0, node, 8):
        store8(scratch, stack + (slot + level) * node + c, load8(scratch, fresh + c))


@kernel
def finish(scratch, stack, splits, oldest, node, out, at, dim, lse):
    """Join a row's maximal nodes left to right and write MA / e, and m + log e where it is asked for."""
    result, start = -1, 0
    while start < splits:
        level = _level(start, splits)
        start += 1 << level
        if start > oldest:
            if result >= 0:
                merge(scratch, result, stack + level * node, node)
            result = stack + level * node
    if lse.size:
        lse[at // dim] = load1(scratch, result + node - 2) + log1(load1(scratch, result + node - 1))
    e = splat8(load1(scratch, result + node - 1))
    for c in range(0, dim & ~7, 8):
        store8(out, at + c, div8(load8(scratch, result + c), e))
    if dim & 7:
        c = dim & ~7
        store8n(out, at + c, div8(load8(scratch, result + c), e), dim & 7)


# ---- nodes that travel: those of a row's splits within a range, left to right -----------------------------------


@kernel
def _nodes(position, window, first, last):
    """(first split, split after the last) that the nodes of a row within a range cover, and `oldest`.

    Where the range holds the row's oldest split there is nothing before it, and nodes are those of the whole row.
    """
    oldest, last = oldest_split(position, window), min(last, position // SPLIT + 1)
    if max(first, oldest) >= last:
        return last, last, oldest
    return (first if first > oldest else 0), last, oldest


@kernel
def most_nodes(query_start_S1, context_S, range_S2, window):
    """How many nodes the rows have in their sequences' ranges, at most."""
    most = 0
    for s in range(context_S.size):
        for position in range(context_S[s] - (query_start_S1[s + 1] - query_start_S1[s]), context_S[s]):
            start, last, oldest = _nodes(position, window, range_S2[s, 0], range_S2[s, 1])
            count = 0
            while start < last:
                start += 1 << _level(start, last)
                count += start > oldest
            most = max(most, count)
    return most


@kernel
def give(scratch, stack, position, window, first, last, levels, node, dim, ma, m, e, at):
    """Write the nodes of the row at `position` from its counter to ma, m and e, from the node numbered `at` on."""
    start, last, oldest = _nodes(position, window, first, last)
    while start < last:
        level = _level(start, last)
        place = stack + (level + (levels if (start >> level) & 1 else 0)) * node
        start += 1 << level
        if start > oldest:
            for c in range(0, dim, 8):
                store8n(ma, at * dim + c, load8(scratch, place + c), min(8, dim - c))
            m[at], e[at] = load1(scratch, place + node - 2), load1(scratch, place + node - 1)
            at += 1


@kernel(parallel=True)
def fold(ma, m, e, pitch, query_start_S1, context_S, range_OS2, offset_O, heads, dim, out, lse, window):
    """Merge every owner's nodes: owner o's of a head's row are those numbered row · pitch + offset_O[o] and on."""
    levels, node = levels_of(context_S), (dim + 7) // 8 * 8 + 8
    for token in prange(query_start_S1[query_start_S1.size - 1]):
        s = last_start(query_start_S1, token)
        position = np.int64(context_S[s]) - (query_start_S1[s + 1] - token)
        scratch = np.empty((levels + 1) * node, np.float32)
        for row in range(token * heads, (token + 1) * heads):
            for owner in range(offset_O.size):
                at = row * pitch + offset_O[owner]
                start, last, oldest = _nodes(position, window, range_OS2[owner, s, 0], range_OS2[owner, s, 1])
                while start < last:
                    level = _level(start, last)
                    if start + (1 << level) > oldest:
                        for c in range(0, node - 8, 8):
                            store8(scratch, c, load8n(ma, at * dim + c, min(8, dim - c)))
                        scratch[node - 2], scratch[node - 1] = m[at], e[at]
                        insert(scratch, 0, node, start, level, 0, oldest, levels, node)
                        at += 1
                    start += 1 << level
            splits = position // SPLIT + 1
            finish(scratch, node, splits, oldest_split(position, window), node, out, row * dim, dim, lse)
