"""The linears: fused parts as views, shard offsets, the kernel slot."""

import pytest
import torch

from headrace.config import ModelConfig
from headrace.kernels.base import LinearKernel
from headrace.kernels.load import load_ops
from headrace.kernels.panels import rows_of
from headrace.model.layers import Attention, GatedMLP
from headrace.parallel.group import RankGroup
from headrace.parallel.pieces import Streams
from headrace.parallel.tensor import ColumnParallelLinear, LMHead, RowParallelLinear, VocabParallelEmbedding

ALONE = RankGroup()


@pytest.fixture(scope="module")
def ops():
    return load_ops("reference")


def test_parts_are_views_in_order(ops):
    linear = ColumnParallelLinear(
        ops,
        4,
        (("q_proj", (0, 3, 6)), ("k_proj", (0, 1, 2))),
        bias=True,
        dtype=torch.bfloat16,
        group=ALONE,
        purpose="test",
    )
    pieces = dict(linear.tensors("here."))
    assert all(piece.shape == piece.tensor.shape for piece in pieces.values())
    tensors = {name: piece.tensor for name, piece in pieces.items()}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "here.q_proj.weight": (6, 4),
        "here.q_proj.bias": (6,),
        "here.k_proj.weight": (2, 4),
        "here.k_proj.bias": (2,),
    }
    for i, tensor in enumerate(tensors.values()):
        tensor.fill_(i)
    assert rows_of(linear.weight)[:, 0].tolist() == [0] * 6 + [2] * 2
    assert linear.bias is not None and linear.bias.tolist() == [1] * 6 + [3] * 2
    assert linear.weight.dtype == torch.bfloat16 and linear.bias.dtype == torch.float32
    assert not any(t.requires_grad for t in tensors.values())


def bounds_of(linear: RowParallelLinear) -> tuple[int, ...] | None:
    assert isinstance(linear.kernel, LinearKernel)
    return linear.kernel.bounds


def test_row_parallel_passes_its_bounds(ops):
    linear = RowParallelLinear(
        ops, "down_proj", (0, 3, 3, 8), 5, bias=False, dtype=torch.float32, group=ALONE, purpose="test"
    )
    linear.init_(Streams(0, 3, ALONE), 1.0)
    x = torch.randn(3, 8)
    assert torch.equal(linear(x), ops.linear(x, linear.weight, None, (0, 3, 3, 8)))
    assert [name for name, _ in linear.tensors("mlp.")] == ["mlp.down_proj.weight"]
    assert bounds_of(linear) == (0, 3, 3, 8)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "offsets"),
    [(8, 4, (0, 32, 64, 96, 128)), (6, 2, (0, 48, 96)), (3, 1, (0, 48)), (12, 4, (0, 48, 96, 144, 192))],
)
def test_shards_are_head_groups(ops, heads, kv_heads, offsets):
    config = ModelConfig("LlamaForCausalLM", 100, 64, 172, 1, heads, kv_heads, 16, 32)
    assert bounds_of(Attention(config, ops, 0, torch.zeros(32, 16), ALONE).out) == offsets
    shards = len(offsets) - 1
    expected = {4: (0, 32, 96, 128, 172), 2: (0, 96, 172), 1: (0, 172)}[shards]
    assert bounds_of(GatedMLP(config, ops, 0, ALONE).down) == expected


def test_the_kernel_slot_is_what_computes(ops):
    linear = ColumnParallelLinear(
        ops, 4, (("q_proj", (0, 3)),), bias=False, dtype=torch.float32, group=ALONE, purpose="test"
    )
    linear.kernel = lambda x: x.new_full((x.shape[0], 3), 7.0)
    assert linear(torch.zeros(2, 4)).tolist() == [[7.0] * 3] * 2


def test_a_tied_head_reads_the_embedding(ops):
    embedding = VocabParallelEmbedding(ops, 10, 4, 4, torch.float32, ALONE)
    embedding.init_(Streams(0, 4, ALONE), 1.0, 1.0)
    tied = LMHead(ops, 10, 4, 4, torch.float32, ALONE, tied=embedding)
    before = rows_of(embedding.weight).clone()
    tied.init_(Streams(1, 4, ALONE), 1.0, 1.0)
    assert torch.equal(rows_of(embedding.weight), before)
    assert torch.equal(tied(before[:2]), before[:2] @ before.T)
    assert list(tied.tensors("lm_head")) == []
    free = LMHead(ops, 10, 4, 4, torch.float32, ALONE)
    assert [name for name, _ in free.tensors("lm_head")] == ["lm_head.weight"]
