"""All blocks in one call: the bits of the single operations, for every model, number of rows and of threads."""

from dataclasses import replace

import pytest
import torch

from headrace.attention.context import packed_meta
from headrace.config import ModelConfig
from headrace.kernels.cpu import CpuOps
from headrace.kernels.delegate import ServingOps
from headrace.model.huggingface import fill_weights
from headrace.model.transformer import Transformer
from kernels.layers_kit import trunk

LLAMA = ModelConfig("LlamaForCausalLM", 96, 48, 80, 3, 6, 2, 8, 512, dtype="bfloat16", tie_word_embeddings=True)
MODELS = {
    "llama": LLAMA,
    "qk-norm": replace(LLAMA, architecture="Qwen3ForCausalLM", qk_norm=True, dtype="float32", head_dim=16),
    "biases": replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True, dtype="float16"),
    "odd": replace(LLAMA, hidden_size=33, intermediate_size=45, num_heads=5, num_kv_heads=5, head_dim=6),
}
LENGTHS = ([1], [2], [5, 1, 1], [16], [30, 3], [70, 1, 300])


def models(config: ModelConfig, threads: int) -> tuple[Transformer, Transformer]:
    """The same weights as rows and in panels."""
    ops = CpuOps(threads=threads)
    rows, panels = Transformer(config, ops), Transformer(config, ServingOps(ops))
    rows.init_weights(3, std=0.2)
    with torch.no_grad():
        for name, piece in rows.tensors():
            if piece.tensor.ndim == 1:  # norms and biases, which begin as ones and zeros
                piece.tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    fill_weights(panels, {name: piece.read() for name, piece in rows.tensors()})
    return rows.requires_grad_(False), panels.requires_grad_(False)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_the_single_operations(name, lengths):
    cache = torch.bfloat16 if name == "llama" else torch.float32
    for threads in (1, 2):
        rows, panels = models(MODELS[name], threads)
        expected = trunk(rows, lengths, False, cache)
        for model in (rows, panels):
            for x, y in zip(trunk(model, lengths, True, cache), expected, strict=True):
                assert torch.equal(x, y), (threads, model is panels)


def test_a_window_is_each_layers_own():
    config = replace(LLAMA, sliding_window=20, sliding_layers=(True, False, True))
    rows, panels = models(config, 2)
    expected = trunk(rows, [70, 3], False, torch.float32)
    assert all(map(torch.equal, trunk(panels, [70, 3], True, torch.float32), expected))


def test_weights_that_have_moved_are_read_where_they_are():
    rows, panels = models(LLAMA, 2)
    layers = panels.layers()
    assert layers is not None
    before = trunk(panels, [9], True, torch.float32)
    down = panels.blocks[1].mlp.down.weight
    down.tensor = down.tensor * 2  # type: ignore[union-attr]
    rows.blocks[1].mlp.down.weight.mul_(2)  # type: ignore[union-attr, operator]
    after = trunk(panels, [9], True, torch.float32)
    assert all(map(torch.equal, after, trunk(rows, [9], False, torch.float32))) and not torch.equal(after[0], before[0])


def test_what_a_step_cannot_be_is_refused_before_it_starts():
    _, panels = models(LLAMA, 1)
    layers, meta = panels.layers(), packed_meta([3], 16, torch.device("cpu"))
    assert layers is not None
    blocks, x = torch.zeros(2, 3, 2, 2, 16, 8), torch.ones(3, 48)
    for positions, changed, cache, message in (
        (torch.tensor([0, 1, 512]), meta, blocks, "rotary table's 512"),
        (torch.tensor([0, 1]), meta, blocks, "3 rows with 2 positions"),
        (torch.arange(3), replace(meta, slots_T=torch.tensor([16, 17, 32], dtype=torch.int32)), blocks, "slot 32"),
        (torch.arange(3), meta, torch.zeros(2, 2, 2, 2, 16, 8), "3 layers of 2 heads"),
    ):
        with pytest.raises((IndexError, ValueError), match=message):
            layers(x, positions, cache, changed, 1.0)
    assert not blocks.any()


def test_only_what_the_call_knows_goes_through_it():
    rows, _ = models(LLAMA, 1)
    assert rows.layers() is not None
    rows.blocks[1].mlp.down.after = lambda y: y + 1
    assert rows.layers() is None
    rows, _ = models(LLAMA, 1)
    rows.blocks[0].attention.qkv.kernel = lambda x: x
    assert rows.layers() is None
