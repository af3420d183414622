"""Checkpoints of activations that ranks share, or that lie outside of the device's memory (ZeRO-R's P_a, P_a+cpu).

With full recomputation, what is kept of a block is its input. Every rank of a tensor-parallel group would keep the
same: here each keeps a part, in one piece of memory that is there for good (M_D), and the parts are brought together
when backward comes to the block: one all-gather of b·s·h, where tensor parallelism moves 12 times that for the block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup

__all__ = ["Checkpoints", "keep_checkpoints"]

Zeros = Callable[[int], Tensor]
"""elements → fp32 memory"""


class Checkpoints:
    """The inputs of all blocks, of which this rank keeps a part."""

    def __init__(self, layers: int, group: RankGroup, zeros: Zeros, device: torch.device) -> None:
        """`zeros` gives the memory in which they lie; `group` the ranks that share them."""
        self._layers, self._group, self._zeros, self._device = layers, group, zeros, device
        self._arena_LN = torch.zeros(layers, 0)
        self._shapes: dict[int, torch.Size] = {}

    def put(self, layer: int, x_TD: Tensor) -> None:
        """Keep a block's input until the next one of that block comes."""
        part = -(-x_TD.numel() // self._group.size)
        if part > self._arena_LN.shape[1]:
            # A longer micro-batch begins, in its first block: nothing of an earlier one is needed any more.
            assert layer == 0
            self._arena_LN = self._zeros(self._layers * part).view(self._layers, part)
        flat = x_TD.reshape(-1)[self._group.rank * part : (self._group.rank + 1) * part]
        self._arena_LN[layer, : flat.numel()].copy_(flat)
        self._shapes[layer] = x_TD.shape

    def get(self, layer: int) -> Tensor:
        """A block's input. All ranks that share it ask together."""
        shape = self._shapes[layer]
        part = -(-shape.numel() // self._group.size)
        own = self._arena_LN[layer, :part].to(self._device)
        return self._group.all_gather(own, "checkpoints")[: shape.numel()].view(shape)

    @property
    def nbytes(self) -> int:
        """Of what this rank keeps."""
        return self._arena_LN.nbytes


def keep_checkpoints(model: Transformer, checkpoints: Checkpoints) -> None:
    """Let every block keep its input in `checkpoints`, and compute itself again in backward."""
    for layer, block in enumerate(model.blocks):
        block.forward = _recomputed(layer, block.forward, checkpoints)  # type: ignore[method-assign]


def _recomputed(layer: int, forward: Callable[..., Any], checkpoints: Checkpoints) -> Callable[..., Any]:
    def call(x_TD: Tensor, residual_TD: Tensor | None, *where: Any) -> tuple[Tensor, Tensor]:
        # The block begins by adding its two inputs: their sum is all that it needs.
        stream_TD = x_TD if residual_TD is None else x_TD + residual_TD
        if not torch.is_grad_enabled():
            result: tuple[Tensor, Tensor] = forward(stream_TD, None, *where)
            return result
        return _Checkpoint.apply(layer, lambda x: forward(x, None, *where), checkpoints, stream_TD)

    return call


class _Checkpoint(Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: int,
        run: Callable[[Tensor], tuple[Tensor, Tensor]],
        checkpoints: Checkpoints,
        stream_TD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        checkpoints.put(layer, stream_TD)
        ctx.layer, ctx.run, ctx.checkpoints = layer, run, checkpoints
        return run(stream_TD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stream_TD = ctx.checkpoints.get(ctx.layer).requires_grad_()
        with torch.enable_grad():
            result = ctx.run(stream_TD)
        torch.autograd.backward(result, gradients)
        return None, None, None, stream_TD.grad
