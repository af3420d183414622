"""Attention's partials (MA, m, e), and how a context may be cut into ranges whose owners each compute some of them.

T tokens   S sequences   H query heads   L nodes   d head_dim   O owners
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["SPLIT", "Partials", "nodes_of", "oldest_split", "owners_ranges", "split_ranges"]

SPLIT = 256
"""Tokens of one attention split. Splits are aligned to position 0 of their sequence."""


class Partials(NamedTuple):
    """What one range of a context gives a row (Infinite-LLM, section 4): sums over the keys of each of its *nodes*.

    A node is a run of 2^l splits that begins at a multiple of 2^l, as long as the range and the row's position allow,
    so a range of n splits has at most 2·log₂ n + 1 of them. With score_j = scale · q·k_j, over the keys of a node that
    the row sees:

        m = max score_j        e = Σ exp(score_j − m)        MA = Σ exp(score_j − m) · v_j

    Nodes lie left to right. Rows with fewer of them than the tensors have room for end with (0, −inf, 0).
    """

    MA_THLd: Tensor
    m_THL: Tensor
    e_THL: Tensor

    @classmethod
    def empty(cls, q_THd: Tensor, nodes: int) -> Partials:
        """For the rows of q, with room for `nodes` each, all (0, −inf, 0). fp32."""
        tokens, heads, dim = q_THd.shape
        zeros = torch.zeros(tokens, heads, nodes, dim + 1, device=q_THd.device)
        m_THL = torch.full((tokens, heads, nodes), -torch.inf, device=q_THd.device)
        return cls(zeros[..., :dim].contiguous(), m_THL, zeros[..., dim].contiguous())


def oldest_split(position: int, window: int) -> int:
    """The first split of which the row at `position` sees something."""
    return max(0, position - window + 1) // SPLIT if window else 0


def nodes_of(position: int, window: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    """(first split, level) of the nodes of the row at `position` in the splits first … last − 1, left to right.

    A range that holds the row's oldest split has the nodes of a whole row: nothing that exists lies before it.
    """
    oldest, last = oldest_split(position, window), min(last, position // SPLIT + 1)
    if max(first, oldest) >= last:
        return
    start = first if first > oldest else 0
    while start < last:
        level = 0
        while not (start >> level) & 1 and start + (2 << level) <= last:
            level += 1
        if start + (1 << level) > oldest:
            yield start, level
        start += 1 << level


def split_ranges(range_S2: Tensor, context_len_S: Tensor) -> np.ndarray:
    """Ranges of positions as ranges of splits, int64 [S, 2].

    Raises `ValueError` unless each begins at a multiple of `SPLIT`, and ends at one or not before its context does.
    """
    ranges, contexts = range_S2.tolist(), context_len_S.tolist()
    if len(ranges) != len(contexts):
        raise ValueError(f"{len(ranges)} ranges for {len(contexts)} sequences")
    for (first, last), context in zip(ranges, contexts):
        if not 0 <= first <= last or first % SPLIT or (last % SPLIT and last < context):
            raise ValueError(f"positions {first} … {last} of {context}: a range is cut at multiples of {SPLIT}")
    splits = [(first // SPLIT, -(-last // SPLIT)) for first, last in ranges]
    return np.asarray(splits, np.int64).reshape(-1, 2)


def owners_ranges(ranges: Sequence[Tensor], context_len_S: Tensor, query_start_S1: Tensor, window: int) -> np.ndarray:
    """Every owner's ranges as ranges of splits, int64 [O, S, 2].

    Raises `ValueError` unless, in the order of their owners, a sequence's ranges are all that its rows see.
    """
    splits_OS2 = np.stack([split_ranges(range_S2, context_len_S) for range_S2 in ranges])
    contexts = context_len_S.tolist()
    for s, (start, stop) in enumerate(pairwise(query_start_S1.tolist())):
        if start == stop:
            continue
        own = [(int(first), int(last)) for first, last in splits_OS2[:, s] if first < last]
        oldest, newest = oldest_split(contexts[s] - (stop - start), window), (contexts[s] - 1) // SPLIT
        joined = own and own[0][0] <= oldest and own[-1][1] > newest
        if not joined or any(a[1] != b[0] for a, b in pairwise(own)):
            raise ValueError(f"ranges {own} of splits are not the splits {oldest} … {newest} of sequence {s} in order")
    return splits_OS2
