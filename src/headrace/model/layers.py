"""The parts of a block: norm, attention, gated MLP. Each lists its tensors under their checkpoint names.

T tokens   D hidden   H query heads   G kv heads   d head_dim   I intermediate   P positions
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from headrace.attention.context import AttentionContext
from headrace.config import ModelConfig
from headrace.kernels.ops import Ops, shard_bounds
from headrace.parallel.group import RankGroup
from headrace.parallel.heads import HeadLayout
from headrace.parallel.operators import shared
from headrace.parallel.pieces import Piece, Streams
from headrace.parallel.tensor import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear

__all__ = ["Attention", "GatedMLP", "RMSNorm", "weight_dtype"]


def weight_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype of matrices; norms and biases are always fp32."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


class RMSNorm(nn.Module):
    """Adds the block's output to the residual stream and normalises the sum, in one op."""

    def __init__(self, ops: Ops, width: int, eps: float, group: RankGroup) -> None:
        super().__init__()
        self.ops = ops
        self.eps = eps
        self.group = group
        self.weight = nn.Parameter(torch.ones(width, device=ops.device))

    def __call__(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); `residual` None starts the stream with x."""
        weight_D = shared(self.weight, self.group, self.group.sequence, "norm")
        if residual_TD is None:
            return self.ops.rms_norm(x_TD, weight_D, self.eps), x_TD
        return self.ops.add_rms_norm(x_TD, residual_TD, weight_D, self.eps)

    def init_(self, streams: Streams, std: float, out_std: float) -> None:
        """Ones."""
        self.weight.detach().fill_(1.0)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Piece]]:
        """(checkpoint name, piece) of the weight, to be read or filled."""
        yield f"{prefix}.weight", Piece.whole(self.weight.detach(), self.group)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, where the family has it, qk-norm."""

    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, rope_Pd: Tensor, group: RankGroup) -> None:
        super().__init__()
        dim, dtype = config.head_dim, weight_dtype(config)
        heads = HeadLayout(config, group)
        self.ops = ops
        self.group = group
        self.layer = layer
        self.rope_Pd = rope_Pd
        self.eps = config.rms_norm_eps
        self.qkv = QKVParallelLinear(
            ops, config.hidden_size, heads, bias=config.qkv_bias, dtype=dtype, group=group, purpose="attention"
        )
        # A virtual shard is a group of heads, so a rank that holds those heads holds the whole shard.
        self.out = RowParallelLinear(
            ops,
            "o_proj",
            heads.q_bounds,
            config.hidden_size,
            bias=config.o_bias,
            dtype=dtype,
            group=group,
            purpose="attention",
        )
        self.q_norm = nn.Parameter(torch.ones(dim, device=ops.device)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(dim, device=ops.device)) if config.qk_norm else None

    def forward(self, x_TD: Tensor, positions_T: Tensor, ctx: AttentionContext) -> Tensor:
        """[T, D] → [T, D]."""
        q_THd, k_TGd, v_TGd = self.qkv.heads(x_TD)
        q_THd = self.ops.rotary(q_THd, positions_T, self.rope_Pd, self._of_heads(self.q_norm), self.eps)
        k_TGd = self.ops.rotary(k_TGd, positions_T, self.rope_Pd, self._of_heads(self.k_norm), self.eps)
        return self.out(ctx.attend(self.layer, q_THd, k_TGd, v_TGd).flatten(1))

    def _of_heads(self, weight_d: Tensor | None) -> Tensor | None:
        """A weight that all heads share, of which this rank holds some, so its gradient is summed over ranks."""
        return None if weight_d is None else shared(weight_d, self.group, True, "qk_norm")

    def init_(self, streams: Streams, std: float, out_std: float) -> None:
        """Normal weights; `out_std` is that of the projection back into the residual stream."""
        self.qkv.init_(streams, std)
        self.out.init_(streams, out_std)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Piece]]:
        """(checkpoint name, piece) of every tensor, to be read or filled."""
        yield from self.qkv.tensors(prefix)
        yield from self.out.tensors(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield f"{prefix}q_norm.weight", Piece.whole(self.q_norm.detach(), self.group)
            yield f"{prefix}k_norm.weight", Piece.whole(self.k_norm.detach(), self.group)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, group: RankGroup) -> None:
        super().__init__()
        bounds, dtype = shard_bounds(config.intermediate_size, config.shards), weight_dtype(config)
        self.ops = ops
        self.gate_up = ColumnParallelLinear(
            ops,
            config.hidden_size,
            (("gate_proj", bounds), ("up_proj", bounds)),
            bias=config.mlp_bias,
            dtype=dtype,
            group=group,
            purpose="mlp",
        )
        self.down = RowParallelLinear(
            ops, "down_proj", bounds, config.hidden_size, bias=config.mlp_bias, dtype=dtype, group=group, purpose="mlp"
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D]."""
        return self.down(self.ops.silu_mul(self.gate_up(x_TD)))

    def init_(self, streams: Streams, std: float, out_std: float) -> None:
        """Normal weights; `out_std` is that of the projection back into the residual stream."""
        self.gate_up.init_(streams, std)
        self.down.init_(streams, out_std)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Piece]]:
        """(checkpoint name, piece) of every tensor, to be read or filled."""
        yield from self.gate_up.tensors(prefix)
        yield from self.down.tensors(prefix)
