"""Gradients equal those of plain torch; forward has the bits of the base."""

import copy

import pytest
import torch
import torch.nn.functional as F

from headrace.attention.context import packed_meta
from headrace.kernels.autograd import AutogradOps
from headrace.kernels.load import load_ops
from headrace.kernels.ops import Ops
from headrace.kernels.reference import ReferenceOps
from headrace.kernels.shards import vocab_bounds
from headrace.kernels.training import TrainingOps
from headrace.kernels.vocab import VocabPart
from headrace.parallel.group import RankGroup

T, D, H, G, d, P = 21, 24, 4, 2, 8, 64


@pytest.fixture(scope="module", params=["reference", "cpu"])
def base(request):
    return load_ops(request.param)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(dtype)


def check(ours, plain, *inputs, atol=2e-5):
    """`ours` and `plain` of the same inputs: outputs agree, and so do the gradients of a random projection."""
    results = []
    for function in (ours, plain):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        loss = sum((y.double() * normal(*y.shape, seed=9).double()).sum() for y in out)
        results.append((out, torch.autograd.grad(loss, leaves)))
    for kind in (0, 1):
        for a, b in zip(results[0][kind], results[1][kind], strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            torch.testing.assert_close(a, b, atol=atol, rtol=2e-4)


def rms(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("bounds", [None, (0, 8, 8, 16, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(base, bounds, bias):
    ops = AutogradOps(base)
    inputs = (normal(T, D), normal(17, D), *([normal(17)] if bias else []))
    check(lambda x, w, b=None: ops.linear(x, w, b, bounds), F.linear, *inputs)


def test_linear_of_half_weights_has_half_gradients(base):
    ops = AutogradOps(base)
    weight = normal(17, D, dtype=torch.bfloat16).requires_grad_()
    (grad,) = torch.autograd.grad(ops.linear(normal(T, D), weight).sum(), weight)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad[0].float(), normal(T, D).sum(0).bfloat16().float())


def test_norms(base):
    ops = AutogradOps(base)
    check(lambda x, w: ops.rms_norm(x, w, 1e-5), rms, normal(T, D), normal(D))
    check(
        lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: (rms(x + r, w), x + r),
        normal(T, D),
        normal(T, D, seed=3),
        normal(D),
    )
    # Each output alone: the other's gradient does not exist.
    check(
        lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5)[0],
        lambda x, r, w: rms(x + r, w),
        normal(T, D),
        normal(T, D, seed=3),
        normal(D),
    )
    check(lambda x, r: ops.add_rms_norm(x, r, normal(D), 1e-5)[1], torch.add, normal(T, D), normal(T, D, seed=3))


@pytest.mark.parametrize("normed", [False, True])
def test_rotary_of_a_view(base, normed):
    ops = AutogradOps(base)
    positions = torch.arange(T, dtype=torch.int32) * 3
    angle = torch.arange(P)[:, None] * 10.0 ** -torch.arange(d // 2)
    table = torch.cat((angle.cos(), angle.sin()), 1).float()

    def plain(x, weight=None):
        x = x[:, 1 : 1 + G]
        x = x if weight is None else rms(x, weight)
        cos, sin = table[positions.long()][:, None].chunk(2, -1)
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    inputs = (normal(T, H, d), *([normal(d)] if normed else []))
    check(lambda x, w=None: ops.rotary(x[:, 1 : 1 + G], positions, table, w, 1e-5), plain, *inputs)


def test_silu_mul_and_embedding(base):
    ops = AutogradOps(base)
    check(ops.silu_mul, lambda x: F.silu(x[:, :D]) * x[:, D:], normal(T, 2 * D))
    ids = torch.tensor([3, 0, 3, 3, 9], dtype=torch.int64)
    check(lambda table: ops.embedding(ids, table), lambda table: table[ids], normal(10, D))


def test_log_probability(base):
    targets = torch.arange(T) * 5 % 130
    bounds = vocab_bounds(130, 2)
    part = VocabPart(0, bounds, RankGroup())
    check(
        lambda z: AutogradOps(base).log_probability(z, targets, part),
        lambda z: F.log_softmax(z, -1)[torch.arange(T), targets],
        normal(T, 130) * 4,
    )


def test_the_head_s_loss_is_never_all_logits_at_once(base, monkeypatch):
    monkeypatch.setattr("headrace.kernels.head.CHUNK", 8)
    rows = []
    linear = base.linear

    def watched(x, *rest):
        rows.append(len(x))
        return linear(x, *rest)

    monkeypatch.setattr(base, "linear", watched)
    targets, weights = torch.arange(T) * 5 % 130, normal(T)
    part = VocabPart(0, vocab_bounds(130, 2), RankGroup())
    check(
        lambda x, w: AutogradOps(base).head_loss(x, w, targets, weights, part)[0],
        lambda x, w: (F.log_softmax((x @ w.T).double(), -1)[torch.arange(T), targets] * weights).sum(),
        normal(T, D),
        normal(130, D),
    )
    assert rows == [8, 8, 5]
    with torch.no_grad():
        loss, logprob = base.head_loss(normal(T, D), normal(130, D), targets, weights, part)
        assert AutogradOps(base).head_loss(normal(T, D), normal(130, D), targets, weights, part)[0] == loss
    whole = linear(normal(T, D), normal(130, D))
    expected = base.score(whole, base.logsumexp(whole, part.bounds), targets)[0]
    torch.testing.assert_close(logprob, expected, rtol=0, atol=0 if base.name == "cpu" else 1e-4)


def plain_attention(q, k, v, lengths, scale, window):
    out = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v))):
        q, k, v = parts
        at = torch.arange(len(q))
        back = at[:, None] - at
        seen = (back >= 0) & ((back < window) if window else torch.ones_like(back, dtype=torch.bool))
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        out.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(out)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("lengths", [[21], [1, 40, 33, 1, 300, 64, 40]])
def test_causal_attention(base, lengths, window):
    meta = packed_meta(lengths, 16, base.device)
    rows = sum(lengths)
    check(
        lambda q, k, v: AutogradOps(base).causal_attention(q, k, v, meta, 16, torch.float32, 0.4, window),
        lambda q, k, v: plain_attention(q, k, v, lengths, 0.4, window),
        normal(rows, H, d),
        normal(rows, G, d, seed=5),
        normal(rows, G, d, seed=6),
    )


def test_attention_reads_what_the_cache_holds(base):
    """With a bf16 cache, forward and backward see the rounded k and v; the rounding itself has gradient one."""
    meta = packed_meta([30], 16, base.device)
    q, k, v = normal(30, H, d), normal(30, G, d, seed=5), normal(30, G, d, seed=6)
    check(
        lambda q, k, v: AutogradOps(base).causal_attention(q, k, v, meta, 16, torch.bfloat16, 0.4),
        lambda q, k, v: plain_attention(
            q, k + (k.bfloat16().float() - k).detach(), v + (v.bfloat16().float() - v).detach(), [30], 0.4, 0
        ),
        q,
        k,
        v,
    )


def test_forward_has_the_bits_of_the_base(base):
    ops = AutogradOps(base)
    x, weight = normal(T, D).requires_grad_(), normal(17, D).requires_grad_()
    assert torch.equal(ops.linear(x, weight), base.linear(x.detach(), weight.detach()))
    assert torch.equal(ops.rms_norm(x, weight[0], 1e-5), base.rms_norm(x.detach(), weight[0].detach(), 1e-5))
    assert ops.fingerprint() == base.fingerprint() and (ops.name, ops.device) == (base.name, base.device)


def test_nothing_of_the_protocol_is_missing():
    names = {name for name in {**vars(Ops), **vars(TrainingOps)} if not name.startswith("_")} | {"name", "device"}
    assert {name for name in names if not hasattr(AutogradOps(ReferenceOps()), name)} == set()


def test_a_new_op_of_the_protocol_is_the_base_s():
    class Newer(ReferenceOps):
        def new_in_the_protocol(self, x):
            return self, x

    base = Newer()
    ops = AutogradOps(base)
    assert ops.new_in_the_protocol(3) == (base, 3)
    assert getattr(ops.sample, "__self__", None) is base and getattr(ops.linear, "__self__", None) is ops
    with pytest.raises(AttributeError, match="no_such_op"):
        ops.no_such_op  # noqa: B018
    assert copy.copy(ops).base is base
