"""The rotary table: cos and sin of every position, computed once, on the host.

Frequencies and angles are fp32, computed in the steps of the code that trained the checkpoints: exact ones would move
the logits by 3e-5 after 500 tokens. Their cos and sin are computed in float64 and rounded.

    P positions   d head_dim
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headrace.config import ModelConfig, RopeScaling

__all__ = ["rotary_table"]

CHUNK = 4096
"""Positions computed at once, which bounds the float64 memory of a long table."""


def rotary_table(config: ModelConfig, device: torch.device) -> Tensor:
    """[P, d] fp32 with P = max_position_embeddings: cos in the first d/2 columns, sin in the last.

    Row p depends on p and the config alone, never on the length of a sequence. YaRN's attention factor scales
    both halves: queries and keys both pass through the table.
    """
    dim, scaling = config.head_dim, config.rope_scaling
    wave = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    amplitude = 1.0
    if scaling is None:
        frequency = 1.0 / wave
    elif scaling.kind == "linear":
        frequency = 1.0 / wave / scaling.factor
    elif scaling.kind == "llama3":
        frequency = _llama3(1.0 / wave, scaling)
    else:
        frequency = _yarn(wave, scaling, config)
        amplitude = _yarn_amplitude(scaling)
    table_Pd = torch.empty(config.max_position_embeddings, dim)
    for start in range(0, len(table_Pd), CHUNK):
        rows_Pd = table_Pd[start : start + CHUNK]
        positions = torch.arange(start, start + len(rows_Pd), dtype=torch.float32)
        angle = (positions[:, None] * frequency).double()
        rows_Pd.copy_(torch.cat((angle.cos(), angle.sin()), dim=1))
    return table_Pd.mul_(amplitude).to(device)


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    # Fast dimensions stay, slow ones are divided by the factor, those between are blended (Llama 3.1).
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequency)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * frequency / scaling.factor + keep * frequency


def _yarn(wave: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    # "NTK by parts" (YaRN, section 3.2), with the ramp over dimensions as in the released code.
    def dimension(turns: float) -> float:
        cycles = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_dim * math.log(cycles) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(len(wave), dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    keep = 1 - ramp
    return 1.0 / (scaling.factor * wave) * (1 - keep) + 1.0 / wave * keep


def _yarn_amplitude(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def grown(mscale: float) -> float:
        return 1.0 + 0.1 * mscale * math.log(scaling.factor)

    if scaling.mscale and scaling.mscale_all_dim:
        return grown(scaling.mscale) / grown(scaling.mscale_all_dim)
    return grown(1.0)
