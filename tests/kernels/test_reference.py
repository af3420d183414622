"""The reference ops against definitions written out: the kernels are compared with them."""

import itertools
import math

import numpy as np
import pytest
import torch

from headrace.errors import ConfigError
from headrace.kernels.load import load_ops
from headrace.kernels.ops import AttentionMeta, Ops, SampleParams
from headrace.kernels.reference import ReferenceOps
from headrace.kernels.shards import shard_bounds, vocab_bounds
from headrace.kernels.training import TrainingOps

OPS = ReferenceOps()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_every_operation_of_the_protocol_is_there():
    wanted = {name: value for name, value in {**vars(Ops), **vars(TrainingOps)}.items() if name[0] != "_"}
    assert len(wanted) > 12
    assert [name for name in wanted if not hasattr(OPS, name)] == []
    assert [name for name, value in wanted.items() if callable(value) != callable(getattr(OPS, name))] == []
    assert OPS.fingerprint() == ReferenceOps("cpu").fingerprint() != ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_and_linear(dtype):
    table, x, bias = normal(20, 172).to(dtype), normal(3, 172, seed=1), normal(20, seed=2).to(dtype)
    assert torch.equal(OPS.embedding(integers(3, 0, 3), table), table[[3, 0, 3]].float())
    exact = x.double() @ table.double().T + bias.double()
    for bounds in (None, shard_bounds(172, 4), (0, 0, 100, 172, 172)):
        y = OPS.linear(x, table, bias, bounds)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)


def test_norms():
    x, r, w = normal(4, 30), normal(4, 30, seed=1), normal(30, seed=2).bfloat16()
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * w.double()
    torch.testing.assert_close(OPS.rms_norm(x, w, 1e-5).double(), exact, rtol=1e-5, atol=1e-6)
    normed, summed = OPS.add_rms_norm(x, r, w, 1e-5)
    assert torch.equal(summed, x + r)
    assert torch.equal(normed, OPS.rms_norm(x + r, w, 1e-5))


def test_rotary_is_a_rotation_of_pairs():
    wide = normal(5, 3, 24)
    x = wide[:, :, 4:20]  # a strided view
    angle = normal(9, 8, seed=1)
    positions = integers(8, 0, 3, 3, 1)
    out = OPS.rotary(x, positions, torch.cat((angle.cos(), angle.sin()), dim=1))
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones(5, 8), angle[positions.long()])[:, None]
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), dim=-1))
    assert out.is_contiguous()
    weight = normal(16, seed=2)
    normed = OPS.rotary(x, positions, torch.cat((angle.cos(), angle.sin()), dim=1), weight, 1e-6)
    torch.testing.assert_close(
        normed, OPS.rotary(OPS.rms_norm(x, weight, 1e-6), positions, torch.cat((angle.cos(), angle.sin()), dim=1))
    )


def test_silu_mul():
    x = normal(3, 14)
    gate, up = x.double()[:, :7], x.double()[:, 7:]
    torch.testing.assert_close(OPS.silu_mul(x).double(), gate / (1 + torch.exp(-gate)) * up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_kv_rounds_and_skips(dtype):
    blocks = torch.full((4, 2, 2, 3, 8, 6), 9.0, dtype=dtype)
    k, v = normal(3, 3, 6), normal(3, 3, 6, seed=1)
    OPS.store_kv_(k, v, blocks, 1, integers(3 * 8 + 5, -1, 8))
    assert torch.equal(blocks[3, 1, 0, :, 5], k[0].to(dtype))
    assert torch.equal(blocks[1, 1, 1, :, 0], v[2].to(dtype))
    assert (blocks == 9.0).sum() == blocks.numel() - 2 * 2 * 3 * 6


@pytest.mark.parametrize("window", [0, 1, 7, 30])
def test_attention_is_softmax_over_what_a_row_sees(window):
    heads, kv_heads, dim, size = 4, 2, 10, 8
    contexts, counts = (21, 5, 33, 9), (4, 5, 1, 0)
    starts = [0, *itertools.accumulate(counts)]
    k, v = normal(4, 33, kv_heads, dim), normal(4, 33, kv_heads, dim, seed=1)
    blocks = torch.full((21, 2, 2, kv_heads, size, dim), torch.nan)
    table = torch.zeros(4, 5, dtype=torch.int32)
    for s, context in enumerate(contexts):
        for at in range(context):
            table[s, at // size] = 1 + s * 5 + at // size
            blocks[table[s, at // size], 1, :, :, at % size] = torch.stack((k[s, at], v[s, at]))
    q = normal(starts[-1], heads, dim, seed=2)
    meta = AttentionMeta(table, integers(*starts), integers(*contexts), integers(*[0] * len(q)), 5, 33)
    got = OPS.attention(q, blocks, 1, meta, 0.3, window)
    for s, (context, count) in enumerate(zip(contexts, counts)):
        for i, h in itertools.product(range(count), range(heads)):
            at = context - count + i
            seen = slice(max(0, at - window + 1) if window else 0, at + 1)
            weights = torch.softmax(k[s, seen, h // 2].double() @ q[starts[s] + i, h].double() * 0.3, dim=0)
            torch.testing.assert_close(
                got[starts[s] + i, h].double(), weights @ v[s, seen, h // 2].double(), rtol=1e-5, atol=1e-5
            )


def test_edits_of_one_token_apply_in_order():
    z = torch.tensor([[2.0, -2.0, 5.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    OPS.edit_logits_(
        z,
        integers(0, 1, 0, 0, 0, 1),
        integers(0, 3, 1, 0, 0, 2),
        torch.tensor([2.0, 1, 2, 1, 4, 1]),
        torch.tensor([0.0, -math.inf, 1, -3, 0.5, 7]),
    )
    # token 0 of row 0: 2/2 = 1, then 1 - 3 = -2, then -2·4 + 0.5
    assert z.tolist() == [[-7.5, -3.0, 5.0, 0.0], [1.0, 1.0, 8.0, -math.inf]]
    OPS.edit_logits_(z, integers(), integers(), torch.empty(0), torch.empty(0))


def test_masks_keep_the_set_bits():
    z = torch.zeros(3, 70)
    allowed = [{0, 31, 32, 69}, {5}]
    words = np.zeros((2, 3), np.uint32)
    for row, ids in enumerate(allowed):
        for i in ids:
            words[row, i >> 5] |= np.uint32(1 << (i & 31))
    OPS.mask_logits_(z, integers(2, 0), torch.from_numpy(words.view(np.int32)))
    for row, ids in ((2, allowed[0]), (0, allowed[1]), (1, set(range(70)))):
        assert {i for i in range(70) if z[row, i] == 0} == ids
        assert all(z[row, i] == -math.inf for i in range(70) if i not in ids)


def test_logsumexp_scores_and_best_tokens():
    z = normal(4, 300)
    z[1, 4:] = -math.inf
    z[2, 7] = z[2, 3] = 50.0
    lse = OPS.logsumexp(z, vocab_bounds(300, 2))
    torch.testing.assert_close(lse, torch.logsumexp(z, dim=1))
    logprob, rank = OPS.score(z, lse, integers(0, 200, 7, 5))
    assert rank.dtype == torch.int32 and rank[2] == 2
    assert logprob[1] == -math.inf
    values, ids = OPS.top_logprobs(z, lse, 2)
    assert ids[2].tolist() == [3, 7] and ids.dtype == torch.int32
    torch.testing.assert_close(values[0], torch.log_softmax(z[0], dim=0).topk(2).values)
    assert OPS.logsumexp(torch.full((1, 8), -math.inf), (0, 8)).item() == -math.inf


def test_nothing_to_do():
    none, row = integers(), torch.empty(0, 8)
    assert OPS.embedding(none, normal(5, 8)).shape == (0, 8)
    assert OPS.linear(row, normal(3, 8), None, (0, 4, 8)).shape == (0, 3)
    assert OPS.rms_norm(row, normal(8), 1e-6).shape == (0, 8)
    assert OPS.rotary(torch.empty(0, 2, 8), none, normal(4, 8)).shape == (0, 2, 8)
    meta = AttentionMeta(torch.zeros(0, 1, dtype=torch.int32), integers(0), none, none, 0, 0)
    blocks = torch.zeros(1, 1, 2, 2, 8, 8)
    assert OPS.attention(torch.empty(0, 2, 8), blocks, 0, meta, 1.0).shape == (0, 2, 8)
    OPS.store_kv_(torch.empty(0, 2, 8), torch.empty(0, 2, 8), blocks, 0, none)
    assert OPS.logsumexp(row, (0, 8)).shape == (0,)
    assert OPS.top_logprobs(row, torch.empty(0), 3)[0].shape == (0, 3)
    empty = SampleParams(*(torch.empty(0),) * 7)
    assert OPS.sample(row, empty).shape == (0,)


def test_copies_go_in_order():
    blocks = torch.arange(4.0).reshape(4, 1, 1, 1, 1, 1).clone()
    OPS.copy_blocks_(blocks, blocks, [(0, 1), (1, 2)])
    assert blocks.flatten().tolist() == [0, 0, 0, 3]


def test_an_unknown_kernel_set_is_refused():
    with pytest.raises(ConfigError, match="not one of cpu, reference, cuda"):
        load_ops("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        load_ops("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees_with_the_cpu():
    gpu = load_ops("cuda")
    z = normal(16, 1000)
    params = SampleParams(
        torch.full((16,), 0.8),
        torch.full((16,), 50),
        torch.full((16,), 0.9),
        torch.zeros(16),
        torch.arange(16),
        torch.zeros(16, dtype=torch.int64),
        torch.arange(16),
    )
    assert torch.equal(gpu.sample(z.cuda(), params).cpu(), OPS.sample(z, params))
    x, w = normal(5, 100), normal(100, seed=1)
    torch.testing.assert_close(gpu.rms_norm(x.cuda(), w.cuda(), 1e-6).cpu(), OPS.rms_norm(x, w, 1e-6))
    rows = torch.arange(5)
    assert torch.equal(gpu.dropout(x.cuda(), 7, rows, 3, 0.5).cpu(), OPS.dropout(x, 7, rows, 3, 0.5))
