"""Checkpoints of random weights: speed and memory do not depend on their values."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from headrace.config import ModelConfig
from headrace.kernels.load import load_ops
from headrace.kernels.ops import Ops
from headrace.model.huggingface import save_model
from headrace.model.transformer import Transformer

__all__ = ["SHAPES", "independent_pair", "random_checkpoint", "random_model"]

SHAPES = {
    "tiny": ModelConfig("LlamaForCausalLM", 512, 64, 160, 2, 8, 4, 8, 2048, dtype="float32", tie_word_embeddings=True),
    "small": ModelConfig(
        "LlamaForCausalLM", 32000, 768, 2048, 12, 12, 4, 64, 4096, dtype="bfloat16", tie_word_embeddings=True
    ),
    "mid": ModelConfig(
        "Qwen3ForCausalLM",
        151936,
        1024,
        3072,
        28,
        16,
        8,
        128,
        4096,
        dtype="bfloat16",
        qk_norm=True,
        tie_word_embeddings=True,
    ),
}
"""tiny: 0.1M parameters. small: 100M parameters. mid: the shape of Qwen3-0.6B."""


def random_model(config: ModelConfig, ops: Ops, seed: int = 0) -> Transformer:
    """A model of random weights in memory, ready to generate."""
    model = Transformer(config, ops)
    model.init_weights(seed)
    return model.requires_grad_(False)


def _independent_model(config: ModelConfig, ops: Ops, logits_V: Tensor, seed: int = 0) -> Transformer:
    """A model that computes as much as any of its shape, and gives `logits_V` [V] behind every prefix.

    Its head is not tied to its embeddings.
    """
    model = random_model(config, ops, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                weight.zero_()
            elif name in ("embed.weight", "norm.weight"):
                weight.fill_(1.0)
            elif name == "lm_head.weight":
                weight.copy_((logits_V / config.hidden_size)[:, None].expand(-1, config.hidden_size))
    return model


def independent_pair(
    shapes: tuple[ModelConfig, ModelConfig], ops: Ops, noise: float, seed: int
) -> tuple[tuple[Transformer, Transformer], tuple[list[float], list[float]]]:
    """A target and a draft model, and their distributions p and q [V], which no prefix changes.

    So acceptances are independent and α is known exactly. `noise`: deviation of the draft's logits from the target's.
    """
    draw = torch.Generator().manual_seed(seed)
    p_V = 2.0 * torch.randn(shapes[0].vocab_size, generator=draw)
    q_V = p_V + noise * torch.randn(shapes[0].vocab_size, generator=draw)
    target, draft = _independent_model(shapes[0], ops, p_V), _independent_model(shapes[1], ops, q_V)
    return (target, draft), (p_V.double().softmax(dim=0).tolist(), q_V.double().softmax(dim=0).tolist())


def random_checkpoint(shape: str | ModelConfig, folder: Path, seed: int = 0, dtype: str | None = None) -> Path:
    """Write a Hugging Face folder of `shape` (a name in `SHAPES` or a configuration), unless it exists."""
    config = SHAPES[shape] if isinstance(shape, str) else shape
    config = replace(config, dtype=dtype or config.dtype, bos_token_id=0, eos_token_ids=(1,))
    if (folder / "complete").exists():
        return folder
    save_model(random_model(config, load_ops("reference"), seed), folder)
    _byte_tokenizer(config.vocab_size).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    (folder / "complete").touch()
    return folder


def _byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE with exactly `vocab_size` tokens: the bytes, then pairs and triples in a fixed order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet]
    pairs = list(itertools.product(alphabet, alphabet))
    triples = ((a + b, c) for (a, b), c in itertools.product(pairs, alphabet))
    merges = list(itertools.islice(itertools.chain(pairs, triples), max(0, vocab_size - len(tokens))))
    vocab = {token: i for i, token in enumerate([*tokens, *(a + b for a, b in merges)][:vocab_size])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
