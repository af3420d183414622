"""Attention in torch: a partial of each split, merged in the tree of `headrace.kernels.partials`.

I rows that see the same splits   J keys   H query heads   G kv heads   d head_dim
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from headrace.kernels.ops import AttentionMeta
from headrace.kernels.partials import SPLIT, Partials, nodes_of, oldest_split, owners_ranges, split_ranges

__all__ = ["attention_partials", "fold_partials", "visible"]

Node = tuple[Tensor, Tensor, Tensor]
"""MA [I, H, d], m [I, H] and e [I, H] of a node, contiguous."""


def visible(positions: range, keys: range, window: int, device: torch.device) -> Tensor:
    """[I, J]: whether the row at a position sees the key at another."""
    at_I1 = torch.arange(positions.start, positions.stop, device=device)[:, None]
    at_J = torch.arange(keys.start, keys.stop, device=device)
    seen_IJ = at_J <= at_I1
    return seen_IJ & (at_J > at_I1 - window) if window else seen_IJ


def attention_partials(
    q_THd: Tensor, blocks: Tensor, layer: int, meta: AttentionMeta, scale: float, range_S2: Tensor, window: int
) -> Partials:
    """See `Ops.attention_partials`."""
    splits_S2 = split_ranges(range_S2, meta.context_len_S)
    found: list[tuple[slice, list[Node | None]]] = []
    for s, rows, positions in _runs(meta, window):
        places = list(nodes_of(positions.start, window, *splits_S2[s].tolist()))
        own = {
            (split, 0): _split(q_THd[rows], blocks, layer, meta.block_table_SM[s], positions, split, scale, window)
            for start, level in places
            for split in range(max(start, oldest_split(positions.start, window)), start + (1 << level))
        }
        found.append((rows, [_node(own, *place) for place in places]))
    parts = Partials.empty(q_THd, max((len(nodes) for _, nodes in found), default=0))
    for rows, nodes in found:
        for i, node in enumerate(nodes):
            assert node is not None
            for whole, part in zip(parts, node):
                whole[rows, :, i] = part
    return parts


def fold_partials(
    parts: Sequence[Partials], ranges: Sequence[Tensor], meta: AttentionMeta, window: int, lse_TH: Tensor | None
) -> Tensor:
    """See `Ops.fold_partials`."""
    splits_OS2 = owners_ranges(ranges, meta.context_len_S, meta.query_start_S1, window)
    tokens, heads, _, dim = parts[0].MA_THLd.shape
    out_THd = torch.empty(tokens, heads, dim, device=parts[0].MA_THLd.device)
    for s, rows, positions in _runs(meta, window):
        given = {}
        for part, splits_S2 in zip(parts, splits_OS2):
            for i, place in enumerate(nodes_of(positions.start, window, *splits_S2[s].tolist())):
                MA, m, e = (x[rows, :, i].contiguous() for x in part)
                given[place] = MA, m, e
        first, *others = [_node(given, *place) for place in nodes_of(positions.start, window, 0, positions.stop)]
        for node in others:
            first = _merge(first, node)
        assert first is not None
        MA, m, e = first
        out_THd[rows] = MA / e[..., None]
        if lse_TH is not None:
            lse_TH[rows] = m + torch.log(e)
    return out_THd


def _runs(meta: AttentionMeta, window: int) -> Iterator[tuple[int, slice, range]]:
    """(sequence, rows, their positions) of rows that see the same splits: one tree serves them all."""
    contexts = meta.context_len_S.tolist()
    for s, (start, stop) in enumerate(pairwise(meta.query_start_S1.tolist())):
        shift = contexts[s] - stop
        while start < stop:
            position = start + shift
            end = (position // SPLIT + 1) * SPLIT
            if window:
                end = min(end, (oldest_split(position, window) + 1) * SPLIT + window - 1)
            last = min(stop, end - shift)
            yield s, slice(start, last), range(position, last + shift)
            start = last


def _split(
    q_IHd: Tensor,
    blocks: Tensor,
    layer: int,
    table_M: Tensor,
    positions: range,
    split: int,
    scale: float,
    window: int,
) -> Node:
    oldest = max(0, positions.start - window + 1) if window else 0
    keys = range(max(split * SPLIT, oldest), min((split + 1) * SPLIT, positions.stop))
    keys_GJd, values_GJd = _gather(blocks, layer, table_M, keys)
    q_GNId = q_IHd.float().transpose(0, 1).unflatten(0, (keys_GJd.shape[0], -1))
    scores = (q_GNId @ keys_GJd.unsqueeze(1).mT) * scale
    scores = scores.masked_fill(~visible(positions, keys, window, blocks.device), -torch.inf)
    m = scores.amax(dim=-1)
    weights = torch.exp(scores - m[..., None])
    ma = (weights @ values_GJd.unsqueeze(1)).flatten(0, 1).transpose(0, 1).contiguous()
    return ma, m.flatten(0, 1).T.contiguous(), weights.sum(dim=-1).flatten(0, 1).T.contiguous()


def _gather(blocks: Tensor, layer: int, table_M: Tensor, keys: range) -> tuple[Tensor, Tensor]:
    """Keys and values [G, J, d] of these positions, fp32."""
    size = blocks.shape[4]
    positions_J = torch.arange(keys.start, keys.stop, device=blocks.device)
    block_J = table_M.to(blocks.device, torch.int64)[positions_J // size]
    both_J2Gd = blocks[block_J, layer, :, :, positions_J % size].float()
    keys_JGd, values_JGd = both_J2Gd.unbind(dim=1)
    return keys_JGd.transpose(0, 1), values_JGd.transpose(0, 1)


def _node(given: Mapping[tuple[int, int], Node], start: int, level: int) -> Node | None:
    """The node of 2^level splits from `start`, from given nodes; None where all of it is outside the window."""
    if (start, level) in given or not level:
        return given.get((start, level))
    left, right = _node(given, start, level - 1), _node(given, start + (1 << level - 1), level - 1)
    return right if left is None else _merge(left, right)


def _merge(left: Node | None, right: Node | None) -> Node:
    assert left is not None and right is not None
    m = torch.maximum(left[1], right[1])
    by_left, by_right = torch.exp(left[1] - m), torch.exp(right[1] - m)
    ma = left[0] * by_left[..., None] + right[0] * by_right[..., None]
    return ma, m, left[2] * by_left + right[2] * by_right
