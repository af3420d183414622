"""What `Ops.layers` is told of a model's blocks, to run them all in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from headrace.kernels.panels import Weight

__all__ = ["LayerForm", "LayerWeights"]


@dataclass(frozen=True, slots=True)
class LayerForm:
    """What all blocks have in common; heads, inner columns and shards are this rank's."""

    width: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    eps: float
    out_bounds: tuple[int, ...]
    """Virtual shards of the sum over heads,"""
    down_bounds: tuple[int, ...]
    """and of that over the inner columns."""
    rope_Pd: Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A block's own: matrices, norms, biases, and the window of its attention (0: none)."""

    input_norm: Tensor
    qkv: Weight
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Weight
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Weight
    gate_up_bias: Tensor | None
    down: Weight
    down_bias: Tensor | None
    window: int
    over_ranks: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None
    """Functions that sum the outputs of `out` and of `down` over the ranks and then add their biases.

    None with one rank, whose products add the biases themselves.
    """
