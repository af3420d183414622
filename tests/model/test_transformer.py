"""The model itself: one result whatever the context, its slices, its weights shared with other ops."""

from __future__ import annotations

import pytest
import torch

from headrace.attention.context import packed_positions
from headrace.attention.dense import DenseContext
from headrace.config import ModelConfig
from headrace.kernels.autograd import AutogradOps
from headrace.kernels.panels import rows_of
from headrace.kernels.shards import vocab_bounds
from headrace.model.transformer import Transformer

CONFIG = ModelConfig(
    "Qwen3ForCausalLM",
    300,
    64,
    172,
    3,
    4,
    2,
    32,
    400,
    qk_norm=True,
    qkv_bias=True,
    sliding_window=50,
    sliding_layers=(False, True, False),
)
BATCH = [[(7 * i * i + 3 * s) % 300 for i in range(length)] for s, length in enumerate((300, 1, 45))]


def tensors(model):
    return [(name, piece.tensor) for name, piece in model.tensors()]


@pytest.fixture(scope="module")
def model(ops):
    model = Transformer(CONFIG, ops)
    model.init_weights(5, std=0.2)
    return model.requires_grad_(False)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dense_is_paged_bit_for_bit(cache_dtype, cpu_ops, dense_logits, paged_logits):
    model = Transformer(CONFIG, cpu_ops)
    model.init_weights(5, std=0.2)
    dense = dense_logits(model, BATCH, cache_dtype=cache_dtype)
    for chunk, block_size in ((300, 16), (64, 8), (7, 32)):
        with torch.no_grad():
            paged = paged_logits(model, BATCH, chunk, block_size=block_size, cache_dtype=cache_dtype)
        assert torch.equal(dense, paged), f"chunks of {chunk}, blocks of {block_size}"
    other = dense_logits(model, BATCH, cache_dtype=torch.float16)
    assert not torch.equal(dense, other), "the cache's dtype must show"


def test_trainer_ops_have_the_same_bits(cpu_ops, dense_logits):
    model = Transformer(CONFIG, cpu_ops)
    model.init_weights(5, std=0.2)
    assert torch.equal(dense_logits(model, BATCH), dense_logits(model.with_ops(AutogradOps(cpu_ops)), BATCH))


def forward(model, rows=None):
    ctx = DenseContext(model.ops, model.config, [len(tokens) for tokens in BATCH])
    ids = torch.tensor([token for tokens in BATCH for token in tokens])
    return model(ids, packed_positions([len(tokens) for tokens in BATCH], model.ops.device), ctx, rows)


def test_rows_are_rows_of_all_the_logits(model):
    every = forward(model)
    assert every.shape == (346, 300) and every.dtype == torch.float32
    rows = torch.tensor([299, 0, 300, 345])
    torch.testing.assert_close(forward(model, rows), every[rows], rtol=0, atol=0 if model.ops.name == "cpu" else 1e-4)
    assert forward(model, rows[:0]).shape == (0, 300)


def test_slices_are_the_whole(model):
    ctx = DenseContext(model.ops, model.config, [len(tokens) for tokens in BATCH])
    positions = packed_positions([len(tokens) for tokens in BATCH], model.ops.device)
    x, residual = model.embed(torch.tensor([token for tokens in BATCH for token in tokens])), None
    for stage in (model.blocks[:1], model.blocks[1:3]):
        for block in stage:
            x, residual = block(x, residual, positions, ctx)
    assert torch.equal(model.head(x, residual), forward(model))


def test_gradients_reach_every_weight(reference_ops):
    model = Transformer(CONFIG, AutogradOps(reference_ops))
    model.init_weights(0)
    forward(model).square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_initial_weights(reference_ops):
    one, same, other = (Transformer(CONFIG, reference_ops) for _ in range(3))
    one.init_weights(1)
    same.init_weights(1)
    other.init_weights(2)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors(one), tensors(same), strict=True))
    assert not torch.equal(rows_of(one.embed.weight), rows_of(other.embed.weight))
    block = one.blocks[1]
    assert rows_of(block.attention.qkv.weight).std().item() == pytest.approx(0.02, rel=0.05)
    for linear in (block.attention.out, block.mlp.down):
        assert rows_of(linear.weight).std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert torch.equal(one.norm.weight, torch.ones(64))
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in one.parameters())


def test_with_ops_shares_the_weights(reference_ops):
    trained = Transformer(CONFIG, AutogradOps(reference_ops))
    trained.init_weights(0)
    served = trained.with_ops(reference_ops)
    assert served.ops is reference_ops and served.blocks[0].mlp.ops is reference_ops
    assert not any(weight.requires_grad for weight in served.parameters())
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(1.5)
    assert torch.equal(forward(served), forward(trained).detach())
    for ours, theirs in zip(served.parameters(), trained.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


def test_vocabulary_shards(reference_ops):
    assert Transformer(CONFIG, reference_ops).vocab_bounds == vocab_bounds(300, 4)
