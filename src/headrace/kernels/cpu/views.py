"""What the CPU kernels are given: numpy's views of tensors, and the cuts of sums as arrays, all checked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.cpu.backward import ROWS
from headrace.kernels.cpu.product import CHUNK
from headrace.kernels.shards import Span

__all__ = [
    "NOTHING",
    "VIEWS",
    "alike",
    "bounds_array",
    "bounds_chunks",
    "dense",
    "flat",
    "integers",
    "row_chunks",
    "spans_chunks",
    "strided",
    "viewed",
]

# numpy knows neither bf16 nor (in Numba) fp16: kernels tell them apart by the integer type their bits are viewed as.
VIEWS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
NOTHING = np.empty(0, np.float32)
SHARDS = (1, 2, 4, 8, 16)
"""How many virtual shards a sum may have."""


@functools.lru_cache(maxsize=1024)
def bounds_array(bounds: tuple[int, ...], width: int) -> np.ndarray:
    shards = len(bounds) - 1
    rising = bounds[0] == 0 and bounds[-1] == width and all(a <= b for a, b in pairwise(bounds))
    if not rising or shards not in SHARDS:
        raise ValueError(f"bounds={bounds} must rise from 0 to {width} in 1, 2, 4, 8 or 16 shards")
    return np.asarray(bounds, np.int64)


@functools.lru_cache(maxsize=1024)
def bounds_chunks(bounds: tuple[int, ...], width: int) -> tuple[np.ndarray, int]:
    """`chunks` of virtual shards `bounds` (0, …, width)."""
    bounds_array(bounds, width)
    return chunks([(shard, a, a, b - a) for shard, (a, b) in enumerate(pairwise(bounds))])


@functools.lru_cache(maxsize=1024)
def spans_chunks(spans: tuple[Span, ...], outputs: int, rows: int) -> tuple[np.ndarray, int]:
    """`chunks` of a gradient's spans: columns of `outputs`, rows of a weight of `rows`."""
    shards = [span[0] for span in spans]
    there = all(
        count >= 0 and 0 <= column <= outputs - count and 0 <= row <= rows - count for _, column, row, count in spans
    )
    if not there or sorted(set(shards)) != list(range(len(set(shards)))) or shards != sorted(shards):
        raise ValueError(f"spans={spans} must be of shards in order, within {outputs} columns and {rows} rows")
    if len(set(shards)) not in SHARDS:
        raise ValueError(f"spans={spans} must be of 1, 2, 4, 8 or 16 shards")
    return chunks(spans)


def chunks(spans: Sequence[Span]) -> tuple[np.ndarray, int]:
    """(chunks, levels) as `product` takes them. Shards fall together like a binary counter."""
    rows, before = [], 0
    for shard, own in groupby(spans, lambda span: span[0]):
        parts = [
            (a + done, b + done, min(CHUNK, count - done)) for _, a, b, count in own for done in range(0, count, CHUNK)
        ] or [(0, 0, 0)]
        merges = (~shard & (shard + 1)).bit_length() - 1  # trailing ones
        level = shard.bit_count()
        for i, (a, b, count) in enumerate(parts):
            falls = merges if i + 1 == len(parts) else 0
            rows.append((a, b, count, level - falls, (i > 0) + falls, before))
            before += count
    levels = max(row[3] + max(row[4] - 1, 0) for row in rows) + 1
    return np.asarray(rows, np.int64), levels


@functools.lru_cache(maxsize=64)
def row_chunks(bounds: tuple[int, ...], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(first and last row of every chunk, where each row shard's chunks start) for sums over rows."""
    if bounds[0] != 0 or bounds[-1] != rows or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"bounds={bounds} must rise from 0 to {rows} rows")
    chunks: list[tuple[int, int]] = []
    shards = [0]
    for first, last in pairwise(bounds):
        chunks += [(row, min(row + ROWS, last)) for row in range(first, last, ROWS)]
        shards.append(len(chunks))
    return np.asarray(chunks, np.int64).reshape(-1, 2), np.asarray(shards, np.int64)


def viewed(tensor: Tensor) -> np.ndarray:
    """numpy's view of a weight or cache."""
    if tensor.dtype not in VIEWS or not tensor.is_contiguous():
        raise ValueError(
            f"weights and cache must be contiguous float32, bfloat16 or float16, not {tensor.dtype} "
            f"with strides {tensor.stride()}"
        )
    return tensor.detach().view(VIEWS[tensor.dtype]).numpy()


def integers(values: Tensor, dtype: torch.dtype = torch.int64) -> np.ndarray:
    return (values if values.dtype == dtype else values.to(dtype)).contiguous().numpy()


def dense(x: Tensor) -> np.ndarray:
    """numpy's view of a contiguous fp32 activation."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"an activation must be contiguous float32, not {x.dtype} with strides {x.stride()}")
    return x.detach().numpy()


def flat(x: Tensor) -> np.ndarray:
    """numpy's view of a flat contiguous fp32 tensor."""
    if x.ndim != 1:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} is not flat")
    return dense(x)


def alike(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{name} is {tuple(x.shape)} and {other} {tuple(y.shape)}")


def strided(x: Tensor) -> np.ndarray:
    """One element at the start of a fp32 view: kernels reach the others by offset, so its strides do not matter."""
    if x.dtype != torch.float32 or x.stride(-1) != 1:
        raise ValueError(f"a head view must be float32, contiguous in its last axis, not {x.dtype} {x.stride()}")
    return x.detach().as_strided((1,), (1,)).numpy()
