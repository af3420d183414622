"""Gradients of attention from its log-sum-exp: right, and independent of other sequences."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from headrace.attention.context import packed_meta
from headrace.kernels.cpu import CpuOps
from headrace.kernels.reference import ReferenceOps

ONE, TWO, REFERENCE = CpuOps(threads=1), CpuOps(threads=2), ReferenceOps()
SCALE = 0.3


def case(lengths: list[int], heads: int, kv_heads: int, dim: int, window: int) -> list[Tensor]:
    """g, q, k, v, out, lse and where the sequences start."""
    random = torch.Generator().manual_seed(0)
    g, q = torch.randn(2, sum(lengths), heads, dim, generator=random)
    k, v = torch.randn(2, sum(lengths), kv_heads, dim, generator=random)
    meta = packed_meta(lengths, 16, torch.device("cpu"))
    blocks = torch.empty(int(meta.block_table_SM.max()) + 1, 1, 2, kv_heads, 16, dim)
    ONE.store_kv_(k, v, blocks, 0, meta.slots_T)
    lse = torch.empty(q.shape[:2])
    out = ONE.attention(q, blocks, 0, meta, SCALE, window, lse)
    assert torch.equal(out, ONE.attention(q, blocks, 0, meta, SCALE, window))
    again = torch.empty_like(lse)
    REFERENCE.attention(q, blocks, 0, meta, SCALE, window, again)
    torch.testing.assert_close(lse, again)
    return [g, q, k, v, out, lse, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)]


def backward(ops: CpuOps | ReferenceOps, given: Sequence[Tensor], window: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, `given` the tensors of a `case`."""
    g, q, k, v, out, lse, starts = given
    return ops.attention_backward(g, q, k, v, out, lse, starts, SCALE, window)


def wanted(g: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int) -> tuple[Tensor, ...]:
    """fp64 gradients by torch."""
    leaves = q, k, v = [x.double().requires_grad_() for x in (q, k, v)]
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in pairwise(starts.tolist()):
        at = torch.arange(stop - start)
        back = at[:, None] - at
        seen = (back >= 0) & (back < (window or stop))
        keys, values = (x[start:stop].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[start:stop], keys) * SCALE
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        total = total + (torch.einsum("hij,jhd->ihd", p, values) * g[start:stop].double()).sum()
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("window", [0, 1, 60])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (6, 2, 20), (2, 1, 65), (1, 1, 1)])
@pytest.mark.parametrize("lengths", [[1], [97], [48, 1, 96, 49, 300, 33]])
def test_gradients(lengths, heads, kv_heads, dim, window):
    given = g, q, k, v, out, lse, starts = case(lengths, heads, kv_heads, dim, window)
    got = backward(ONE, given, window)
    for ours, plain, true in zip(
        got, backward(REFERENCE, given, window), wanted(g, q, k, v, starts, window), strict=True
    ):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(plain.double(), true, rtol=1e-4, atol=2e-5)
    for ours, other in zip(got, backward(TWO, given, window), strict=True):
        assert torch.equal(ours, other)
    for start, stop in pairwise(starts.tolist()):
        alone = backward(ONE, [*(x[start:stop] for x in given[:6]), torch.tensor([0, stop - start])], window)
        for ours, theirs in zip(got, alone, strict=True):
            assert torch.equal(ours[start:stop], theirs)
    group = heads // kv_heads
    for head in range(kv_heads):
        mine = slice(head * group, (head + 1) * group)
        few = [g[:, mine], q[:, mine], k[:, head : head + 1], v[:, head : head + 1], out[:, mine], lse[:, mine]]
        own = backward(
            ONE, [*(x.contiguous() for x in few[:2]), *few[2:4], *(x.contiguous() for x in few[4:]), starts], window
        )
        assert torch.equal(own[0], got[0][:, mine])
        assert torch.equal(own[1][:, 0], got[1][:, head]) and torch.equal(own[2][:, 0], got[2][:, head])


def test_what_a_row_does_not_see_is_not_multiplied_into_another_sequence():
    given = case([40, 60], 2, 1, 16, 0)
    before = backward(ONE, given)
    for x in given[:5]:
        x[:40] = torch.nan
    for ours, own in zip(backward(ONE, given), before, strict=True):
        assert ours[:40].isnan().any() and torch.equal(ours[40:], own[40:])


def test_shapes_that_do_not_fit_are_refused():
    g, *rest = case([5], 2, 1, 8, 0)
    with pytest.raises(ValueError, match=r"g is .* and q"):
        backward(ONE, [g[:4], *rest])
