"""A model's blocks on one rank, a call for each half block and op by op."""

from __future__ import annotations

import torch

from headrace.config import ModelConfig
from headrace.kernels.cpu import CpuOps
from headrace.model.transformer import Transformer
from kernels.layers_kit import trunk
from parallel.model_jobs import digest

LENGTHS = [30, 1, 3]


def blocks(group, changes):
    """Digests of (x, residual) of the two ways; they are whole on every rank."""
    shape = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    model = Transformer(ModelConfig(**{**shape, **changes}), CpuOps(threads=1), group=group)
    model.init_weights(5, 0.3)
    with torch.no_grad():
        for block in model.blocks:
            for bias in (block.attention.out.bias, block.mlp.down.bias):
                if bias is not None:
                    bias.copy_(torch.linspace(-1, 1, len(bias)))
        model.requires_grad_(False)
        return [[digest(x) for x in trunk(model, LENGTHS, one_call, torch.float32)[:2]] for one_call in (True, False)]
