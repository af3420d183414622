"""Parity with transformers: every family with random weights, and a real checkpoint."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from headrace.model.huggingface import load_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 8}),
    "llama-multi-query-odd": (
        "Llama",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 48,
            "vocab_size": 131,
            "intermediate_size": 70,
        },
    ),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "Llama",
        {"rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}},
    ),
    "qwen2-yarn-factor": (
        "Qwen2",
        {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 0.5}},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen2-listed": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "hidden_size": 48}),
    "qwen3-bias-window": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
}
PROMPT, NEW = 12, 36


def sequences(vocab_size: int, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


def peer_logits(peer, batch: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([peer(torch.tensor([tokens])).logits[0] for tokens in batch])


def check_greedy(model, peer, prompts, paged_run, label: str) -> None:
    """Generate greedily through the paged cache; every choice is the peer's where its top-2 gap exceeds 1e-3."""
    run = paged_run(model, len(prompts))
    grown = [list(prompt) for prompt in prompts]
    step = {s: list(prompt) for s, prompt in enumerate(prompts)}
    for _ in range(NEW):
        rows = torch.tensor([sum(map(len, list(step.values())[: s + 1])) - 1 for s in range(len(step))])
        for s, token in enumerate(run.step(step, rows).argmax(dim=1).tolist()):
            grown[s].append(token)
            step[s] = [token]
    compared = 0
    for prompt, tokens in zip(prompts, grown):
        logits = peer_logits(peer, [tokens])[len(prompt) - 1 : -1]
        best = logits.topk(2, dim=1)
        clear = best.values[:, 0] - best.values[:, 1] > 1e-3
        chosen = torch.tensor(tokens[len(prompt) :])
        assert torch.equal(best.indices[clear, 0], chosen[clear])
        compared += int(clear.sum())
    print(f"{label}: {compared}/{NEW * len(prompts)} greedy tokens compared and equal")
    assert compared > NEW * len(prompts) // 2


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(name, ops, checkpoint, dense_logits, paged_logits, paged_run):
    family, changes = CASES[name]
    folder, peer = checkpoint(family, seed=len(name), **changes)
    model = load_model(folder, ops)
    batch = sequences(model.config.vocab_size, (41, 1, 23))
    expected = peer_logits(peer, batch)
    assert expected.std() > 0.5, "the peer says too little to be compared with"
    torch.testing.assert_close(dense_logits(model, batch), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(paged_logits(model, batch, 7), expected, rtol=0, atol=1e-4)
    check_greedy(
        model, peer, sequences(model.config.vocab_size, (PROMPT, 5), seed=1), paged_run, f"{name} on {ops.name}"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_half_precision_checkpoints_keep_their_dtype(family, dtype, ops, checkpoint, paged_logits):
    folder, peer = checkpoint(family, seed=3, dtype=dtype)
    model = load_model(folder, ops)
    assert model.embed.weight.dtype == model.blocks[0].attention.qkv.weight.dtype == dtype
    assert model.norm.weight.dtype == torch.float32
    batch = sequences(model.config.vocab_size, (41, 9))
    torch.testing.assert_close(paged_logits(model, batch, 16), peer_logits(peer, batch), rtol=0, atol=1e-4)


def test_dtype_override(reference_ops, checkpoint, paged_logits):
    folder, peer = checkpoint("Qwen2", dtype=torch.bfloat16)
    model = load_model(folder, reference_ops, "float32")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.dtype == "float32"
    batch = sequences(model.config.vocab_size, (20,))
    torch.testing.assert_close(paged_logits(model, batch, 20), peer_logits(peer, batch), rtol=0, atol=1e-4)


def test_sharded_checkpoint(reference_ops, checkpoint, paged_logits):
    folder, peer = checkpoint("Qwen3", shard="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = load_model(folder, reference_ops)
    batch = sequences(model.config.vocab_size, (20,))
    torch.testing.assert_close(paged_logits(model, batch, 20), peer_logits(peer, batch), rtol=0, atol=1e-4)


def test_real_checkpoint(data_dir, ops, load_peer, dense_logits, paged_logits, paged_run):
    folder = data_dir / "checkpoints" / "stories260K"
    model, peer = load_model(folder, ops), load_peer(folder)
    batch = sequences(model.config.vocab_size, (300, 64, 3))
    expected = peer_logits(peer, batch)
    torch.testing.assert_close(dense_logits(model, batch), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(paged_logits(model, batch, 64), expected, rtol=0, atol=1e-4)
    check_greedy(model, peer, [[1], *sequences(512, (7, 30), seed=2)], paged_run, f"stories260K on {ops.name}")
