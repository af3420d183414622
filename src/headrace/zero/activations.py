"""Activation checkpoints, divided over ranks or kept outside of device memory (ZeRO-R's P_a, P_a+cpu).

With full recomputation, the input of every block is kept. Every rank of a tensor-parallel group would keep the same
tensor, so each keeps a part of it, in one allocation that stays (M_D), and backward gathers the parts when it reaches
the block: one all-gather of b·s·h, where tensor parallelism itself moves 12 times that for the block.
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
        """`zeros` allocates their memory; `group`: the ranks that share them."""
        self._layers, self._group, self._zeros, self._device = layers, group, zeros, device
        self._arena_LN = torch.zeros(layers, 0)
        self._shapes: dict[int, torch.Size] = {}

    def put(self, layer: int, x_TD: Tensor) -> None:
        """Keep a block's input, in place of the one before."""
        part = -(-x_TD.numel() // self._group.size)
        if part > self._arena_LN.shape[1]:
            # A longer micro-batch begins at its first block, when no earlier input is needed any more.
            assert layer == 0
            self._arena_LN = self._zeros(self._layers * part).view(self._layers, part)
        flat = x_TD.reshape(-1)[self._group.rank * part : (self._group.rank + 1) * part]
        self._arena_LN[layer, : flat.numel()].copy_(flat)
        self._shapes[layer] = x_TD.shape

    def get(self, layer: int) -> Tensor:
        """A block's input. A collective: all ranks of the group call it."""
        shape = self._shapes[layer]
        part = -(-shape.numel() // self._group.size)
        own = self._arena_LN[layer, :part].to(self._device)
        return self._group.all_gather(own, "checkpoints")[: shape.numel()].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps."""
        return self._arena_LN.nbytes


def keep_checkpoints(model: Transformer, checkpoints: Checkpoints) -> None:
    """Make every block keep only its input, in `checkpoints`, and recompute itself in backward."""
    for layer, block in enumerate(model.blocks):
        block.forward = _recomputed(layer, block.forward, checkpoints)  # type: ignore[method-assign]


def _recomputed(layer: int, forward: Callable[..., Any], checkpoints: Checkpoints) -> Callable[..., Any]:
    def call(x_TD: Tensor, residual_TD: Tensor | None, *where: Any) -> tuple[Tensor, Tensor]:
        # The block begins by adding its two inputs, so their sum is enough.
        stream_TD = x_TD if residual_TD is None else x_TD + residual_TD
        result: tuple[Tensor, Tensor]
        if not torch.is_grad_enabled():
            result = forward(stream_TD, None, *where)
            return result

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            return forward(x, None, *where)  # type: ignore[no-any-return]

        result = _Checkpoint.apply(layer, run, checkpoints, stream_TD)  # type: ignore[no-untyped-call]
        return result

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
