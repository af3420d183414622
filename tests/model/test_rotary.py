"""The rotary table against transformers' own, element by element."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headrace.config import ModelConfig, RopeScaling
from headrace.model.rotary import rotary_table

CASES = {
    "default": (None, {}),
    "linear": (RopeScaling("linear", 3.0), {"rope_type": "linear", "factor": 3.0}),
    "llama3": (
        RopeScaling("llama3", 8.0, 128, low_freq_factor=1.5, high_freq_factor=3.5),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.5,
        },
    ),
    "yarn": (
        RopeScaling("yarn", 4.0, 128),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    "yarn-plain-ramp": (
        RopeScaling("yarn", 4.0, 128, beta_fast=20.0, beta_slow=2.0, truncate=False),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    ),
    "yarn-attention-factor": (
        RopeScaling("yarn", 2.0, 256, attention_factor=0.7),
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "attention_factor": 0.7},
    ),
    "yarn-mscale": (
        RopeScaling("yarn", 16.0, 64, mscale=1.5, mscale_all_dim=0.5),
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.5,
            "mscale_all_dim": 0.5,
        },
    ),
}


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("dim", [8, 48, 128])
@pytest.mark.parametrize("name", CASES)
def test_table_is_the_peers(name, dim, theta, transformers):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling, parameters = CASES[name]
    positions = 5000  # more than one chunk of the table
    config = ModelConfig(
        "LlamaForCausalLM", 100, 2 * dim, 64, 1, 2, 2, dim, positions, rope_theta=theta, rope_scaling=scaling
    )
    peer = LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=2 * dim,
            num_attention_heads=2,
            max_position_embeddings=positions,
            rope_parameters={"rope_type": "default", "rope_theta": theta} | parameters,
        )
    )
    cos, sin = peer(torch.zeros(1), torch.arange(positions)[None])
    expected = torch.cat((cos[0, :, : dim // 2], sin[0, :, : dim // 2]), dim=1)
    table = rotary_table(config, torch.device("cpu"))
    assert table.shape == (positions, dim) and table.dtype == torch.float32 and table.is_contiguous()
    # A ramp may round the last bit of a frequency the other way; an angle of 5000 then moves by 2^-11.
    tolerance = 2e-7 if name in ("default", "linear") else 1e-3
    torch.testing.assert_close(table, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(table[:128], expected[:128], rtol=0, atol=3e-5)


def test_rows_do_not_depend_on_the_table_length():
    config = ModelConfig("LlamaForCausalLM", 100, 64, 64, 1, 2, 2, 32, 6000, rope_scaling=RopeScaling("yarn", 4.0, 128))
    short = rotary_table(dataclasses.replace(config, max_position_embeddings=77), torch.device("cpu"))
    assert torch.equal(rotary_table(config, torch.device("cpu"))[:77], short)
