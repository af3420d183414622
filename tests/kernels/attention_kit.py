"""Random sequences in a paged cache, and attention of them by definition."""

import itertools
from dataclasses import dataclass

import torch

from headrace.kernels.ops import AttentionMeta, Ops

LAYER = 1


@dataclass
class Sequence:
    """One sequence's queries, keys and values for every position: [position, head, dim]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def sequence(
    seed: int, length: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype = torch.float32
) -> Sequence:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(length, heads, dim, generator=generator) * 2 for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    return Sequence(q, k.to(dtype), v.to(dtype))


Parts = list[tuple[Sequence, int, int]]


def packed(
    parts: Parts, block_size: int = 16, window: int = 0, forget: bool = False
) -> tuple[torch.Tensor, torch.Tensor, AttentionMeta]:
    """(q, blocks, meta) of rows first … last − 1 of each sequence, over a cache whose every other slot is NaN.

    With `forget`, blocks before the first row's window are gone: their table entries are the null block.
    """
    k = parts[0][0].k
    counts = [-(-last // block_size) for _, _, last in parts]
    blocks = torch.full((sum(counts) + 1, 2, 2, k.shape[1], block_size, k.shape[2]), torch.nan, dtype=k.dtype)
    order = iter((torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1).tolist())
    table = torch.zeros(len(parts), max(counts, default=1) + 1, dtype=torch.int32)
    for s, (seq, first, last) in enumerate(parts):
        for i in range(counts[s]):
            start, stop = i * block_size, min(last, (i + 1) * block_size)
            if forget and stop <= first - window + 1:
                continue
            table[s, i] = next(order)
            for part, x in enumerate((seq.k, seq.v)):
                blocks[table[s, i], LAYER, part, :, : stop - start] = x[start:stop].transpose(0, 1)
    starts = [0, *itertools.accumulate(last - first for _, first, last in parts)]
    meta = AttentionMeta(
        table,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([last for _, _, last in parts], dtype=torch.int32),
        torch.zeros(starts[-1], dtype=torch.int32),
        0,
        0,
    )
    return torch.cat([seq.q[first:last] for seq, first, last in parts]), blocks, meta


def attend(
    ops: Ops,
    parts: Parts,
    block_size: int = 16,
    window: int = 0,
    scale: float | None = None,
    forget: bool = False,
) -> list[torch.Tensor]:
    """What `Ops.attention` gives for each sequence of a `packed` batch."""
    q, blocks, meta = packed(parts, block_size, window, forget)
    out = ops.attention(q, blocks, LAYER, meta, scale or q.shape[2] ** -0.5, window)
    return [out[a:b] for a, b in itertools.pairwise(meta.query_start_S1.tolist())]


def float64(seq: Sequence, first: int, last: int, window: int = 0) -> torch.Tensor:
    """The definition, a row at a time."""
    group = seq.q.shape[1] // seq.k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (seq.k, seq.v))
    rows = []
    for position in range(first, last):
        seen = slice(max(0, position - window + 1) if window else 0, position + 1)
        scores = torch.einsum("hd,jhd->hj", seq.q[position].double(), k[seen]) * seq.q.shape[2] ** -0.5
        rows.append(torch.einsum("hj,jhd->hd", torch.softmax(scores, dim=-1), v[seen]))
    return torch.stack(rows)
