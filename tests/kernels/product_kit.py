"""Matrix products by definition, operands that lie between NaNs, and every storage that the kernels know."""

from collections.abc import Sequence
from itertools import pairwise

import numba
import numpy as np
import torch
from torch import Tensor

from headrace.kernels.cpu.product import LANES, product, product_alone
from headrace.kernels.cpu.simd import fma1
from headrace.kernels.cpu.views import VIEWS, spans_chunks
from headrace.kernels.shards import Span

CHUNK = 256
"""Terms of a chain: the law's number, whatever the kernels' is."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGES = ("rows", "terms", "panels")
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 31, 33, 70)
OUTPUTS = (1, 11, 15, 17, 33, 47, 63, 65)
BOUNDS: tuple[tuple[int, ...], ...] = (
    (0, 513),
    (0, 0, 300),
    (0, 192, 192),
    (0, 1, 33, 33, 225),
    (0, 257, 258, 450, 482),
    (0, 0, 32, 32, 224),
    (0, 32, 32, 40, 44),
    (0, 0, 1, 33, 33, 225, 482, 514, 514),
    (0, 32, 224, 224, 224, 225, 257, 449, 481),
    (0, 0, 0, 1, 2, 34, 34, 226, 739, 740, 740, 772, 804, 804, 996, 996, 996),
)
"""Shards of 0, 1, 32, 192 inputs and of more than a chunk; empty ones first, in the middle and last."""
AROUND = 21
"""Elements that lie before and after an operand: odd, so that vectors are not aligned."""
UNTOUCHED = -12345.0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def between_nans(x: Tensor) -> Tensor:
    """A copy in memory of its own, with NaN before and after it."""
    around = torch.full((x.numel() + 2 * AROUND,), torch.nan, dtype=x.dtype)
    inside = around[AROUND : AROUND + x.numel()].view(x.shape)
    return inside.copy_(x)


def operands(rows: int, outputs: int, terms: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    x, w, bias = normal(rows, terms, seed=seed), normal(outputs, terms, seed=seed + 1), normal(outputs, seed=seed + 2)
    return between_nans(x), between_nans(w.to(dtype)), between_nans(bias)


def top(x: Tensor, rows: int) -> Tensor:
    return between_nans(x[:rows])


# ---- bits ------------------------------------------------------------------------------------------------------


def bits(x: Tensor) -> Tensor:
    """fp32 as integers: −0 is not +0. All NaNs are one, since which of two NaNs an operation keeps is not defined."""
    return torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32))


def assert_bits(got: Tensor, want: Tensor, *about: object) -> None:
    assert got.shape == want.shape, about
    wrong = (bits(got) != bits(want)).nonzero()
    if len(wrong):
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {got.numel()} differ, first {first}: {got[first]} and not {want[first]}; {about}"
        )


# ---- the law ---------------------------------------------------------------------------------------------------


@numba.njit
def _chain(left, right, a, b, count, sums):
    """sums[m, n] = one chain of fused multiply-adds, from +0, of `count` terms from a of left and from b of right."""
    for m in range(sums.shape[0]):
        for n in range(sums.shape[1]):
            total = np.float32(0)
            for k in range(count):
                total = fma1(left[m, a + k], right[n, b + k], total)
            sums[m, n] = total


def bounds_spans(bounds: Sequence[int]) -> tuple[Span, ...]:
    return tuple((shard, a, a, b - a) for shard, (a, b) in enumerate(pairwise(bounds)))


def _shard(left: np.ndarray, right: np.ndarray, spans: Sequence[Span], earlier: Tensor | None) -> Tensor:
    """The chunks of a shard, one after another; +0 where there is none."""
    total = earlier
    for _, a, b, count in spans:
        for done in range(0, count, CHUNK):
            chunk = torch.empty(len(left), len(right))
            _chain(left, right, a + done, b + done, min(CHUNK, count - done), chunk.numpy())
            total = chunk if total is None else total + chunk
    return torch.zeros(len(left), len(right)) if total is None else total


def definition(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    spans: Sequence[Span] | None = None,
    earlier: Tensor | None = None,
) -> Tensor:
    """Σ left[m, ·] · right[n, ·] + bias[n] in the defined order, one multiplication at a time.

    `spans` are (shard, first term of left, first term of right, how many), by shard; without them there is one shard.
    The first shard's chunks are added to `earlier`, where it is given.
    """
    spans = ((0, 0, 0, left.shape[1]),) if spans is None else spans
    x, w = left.float().numpy(), right.float().numpy()
    shards = [
        _shard(x, w, [span for span in spans if span[0] == i], earlier if i == 0 else None)
        for i in range(1 + max(span[0] for span in spans))
    ]
    while len(shards) > 1:
        shards = [a + b for a, b in zip(shards[::2], shards[1::2], strict=True)]
    return shards[0] if bias is None else shards[0] + bias.float()


# ---- storages --------------------------------------------------------------------------------------------------


def stored(right: Tensor, storage: str) -> tuple[np.ndarray, int, int, int]:
    """A right operand [outputs, terms] as `product` takes it: (w, term, lane, block). Missing lanes are NaN."""
    outputs, terms = right.shape
    if storage == "rows":
        laid, strides = right, (1, terms, LANES * terms)
    elif storage == "terms":
        laid, strides = right.T, (outputs, 1, LANES)
    else:
        panels = -(-outputs // LANES)
        padded = torch.full((panels * LANES, terms), torch.nan, dtype=right.dtype)
        padded[:outputs] = right
        laid, strides = padded.view(panels, LANES, terms).transpose(1, 2), (LANES, 1, LANES * terms)
    return (flat(laid), *strides)


def flat(x: Tensor) -> np.ndarray:
    return between_nans(x.reshape(-1)).view(VIEWS[x.dtype]).numpy()


def multiply(
    left: Tensor,
    right: Tensor,
    storage: str,
    bias: Tensor | None = None,
    spans: Sequence[Span] | None = None,
    earlier: Tensor | None = None,
    turned: bool = False,
    threads: int = 0,
) -> Tensor:
    """`definition` by `product_alone`, or by `product` with so many threads.

    `turned`: the left operand lies term by term. Nothing may be written before or after the result.
    """
    (rows, terms), outputs = left.shape, len(right)
    spans = ((0, 0, 0, terms),) if spans is None else spans
    chunks, levels = spans_chunks(tuple(spans), terms, right.shape[1])
    around = torch.full((rows * outputs + 2 * AROUND,), UNTOUCHED)
    y = around[AROUND : AROUND + rows * outputs].view(rows, outputs)
    if earlier is not None:
        y.copy_(earlier)
    x = (flat(left.T), rows, 1) if turned else (flat(left), 1, terms)
    added = np.empty(0, np.float32) if bias is None else flat(bias)
    job = (
        *x,
        *stored(right, storage),
        added,
        y.reshape(-1).numpy(),
        rows,
        outputs,
        earlier is not None,
        chunks,
        levels,
    )
    if threads:
        product(*job, threads)
    else:
        product_alone(*job)
    beside = torch.cat([around[:AROUND], around[AROUND + rows * outputs :]])
    assert (beside == UNTOUCHED).all(), "something was written beside the result"
    return y
