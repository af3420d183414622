"""How sums over virtual shards and rows are cut and added, and which outputs a virtual shard has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["OutputShards", "Span", "row_bounds", "shard_bounds", "tree", "vocab_bounds"]

Range = tuple[int, int]

Span = tuple[int, int, int, int]
"""(virtual shard, first column of a result, first row of the weight that gives it, how many)."""


def shard_bounds(width: int, shards: int, unit: int = 32) -> tuple[int, ...]:
    """Offsets of `shards` virtual shards over `width` inputs: shard i starts at unit·⌊i·⌈width/unit⌉/shards⌋.

    An empty shard is an exact zero. 172 over 4 gives (0, 32, 96, 128, 172).
    """
    units = -(-width // unit)
    return (*(min(width, unit * (i * units // shards)) for i in range(shards)), width)


def vocab_bounds(vocab_size: int, shards: int) -> tuple[int, ...]:
    """Shard offsets over the vocabulary padded to a multiple of 128·shards, clipped to what exists."""
    padded = -(-vocab_size // (128 * shards)) * 128
    return tuple(min(vocab_size, i * padded) for i in range(shards + 1))


def tree(parts: Sequence[Tensor]) -> Tensor:
    """The sum in a balanced binary tree, neighbours first."""
    parts = list(parts)
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2])]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def row_bounds(rows: int, shards: int) -> tuple[int, ...]:
    """Offsets of row shards: equal ones, the last ones shorter or empty."""
    each = -(-rows // shards)
    return tuple(min(rows, i * each) for i in range(shards + 1))


@dataclass(frozen=True)
class OutputShards:
    """Where the outputs of each virtual shard of a linear lie: rows of its weight, columns of its result.

    The result has a column for every row, but where shards share rows (a kv head that several read), each of them
    has columns of its own; `spread` then gives the row of every column.
    """

    rows: tuple[tuple[Range, ...], ...]
    columns: tuple[tuple[Range, ...], ...]
    spread: Tensor | None
    shared_from: int = 0
    """Rows from here on are on other ranks too; `sum_shared` adds the ranks' gradients of them."""
    sum_shared: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, parts: Sequence[Sequence[Sequence[Range]]], widths: Sequence[int] | None = None) -> OutputShards:
        """`parts[part][shard]` are rows within a part; `widths` the parts' rows (None: their shards share none)."""
        widths = widths or [sum(b - a for shard in part for a, b in shard) for part in parts]
        shards = len(parts[0])
        rows: list[list[Range]] = [[] for _ in range(shards)]
        columns: list[list[Range]] = [[] for _ in range(shards)]
        start = at = 0
        for part, width in zip(parts, widths):
            for shard, ranges in enumerate(part):
                for a, b in ranges:
                    rows[shard].append((start + a, start + b))
                    columns[shard].append((at, at + b - a))
                    at += b - a
            start += width
        spread = None
        if at != start:
            by_column = sorted((c, r) for cs, rs in zip(columns, rows) for c, r in zip(cs, rs))
            spread = torch.cat([torch.arange(*r) for _, r in by_column])
        return cls(tuple(map(tuple, rows)), tuple(map(tuple, columns)), spread)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """As `TrainingOps.linear_backward_input` takes them."""
        return tuple(
            (shard, column, row, stop - row)
            for shard, ranges in enumerate(self.rows)
            for (row, stop), (column, _) in zip(ranges, self.columns[shard], strict=True)
        )

    def of_rows(self, g_columns: Tensor) -> Tensor:
        """The gradients of the weight's rows from those of the result's columns; shares of a row in a tree."""
        whole = g_columns
        if self.spread is not None:
            owners: dict[tuple[int, int], list[Tensor]] = {}
            for _, column, row, count in self.spans:
                owners.setdefault((row, row + count), []).append(g_columns[column : column + count])
            whole = g_columns.new_empty((max(stop for _, stop in owners), *g_columns.shape[1:]))
            for (row, stop), shares in owners.items():
                whole[row:stop] = tree(shares)
        if self.sum_shared is not None:
            whole[self.shared_from :] = self.sum_shared(whole[self.shared_from :])
        return whole
