"""Cross-entropy over a vocabulary that ranks share (Megatron-LM §3): scalars are exchanged, logits never.

R rows   V this rank's part of the vocabulary   S its shards   D hidden
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from headrace.kernels.ops import Ops

__all__ = ["HeadLoss", "LogProbability", "Sharing", "VocabPart"]

CHUNK = 512
"""Rows whose logits exist at once, a multiple of the 256 whose products are summed alone."""


class Sharing(Protocol):
    """What is needed of a group of ranks: `headrace.parallel.group.RankGroup`."""

    def all_reduce(self, x: Tensor, purpose: str, width: int | None = None) -> Tensor: ...

    def all_gather(self, x_RD: Tensor, purpose: str) -> Tensor: ...


@dataclass(frozen=True)
class VocabPart:
    """This rank's part of the vocabulary: tokens from `start`, cut at `bounds` (from 0), shared with `group`."""

    start: int
    bounds: tuple[int, ...]
    group: Sharing

    def log_probabilities(self, ops: Ops, logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log p(target) [R], log-sum-exp [R], the targets within this part, −1 where they are elsewhere)."""
        parts_SR2 = ops.logsumexp_parts(logits_RV, self.bounds).transpose(0, 1).contiguous()
        parts_SR2 = self.group.all_gather(parts_SR2, "cross_entropy")
        lse_R = ops.merge_logsumexp(parts_SR2.transpose(0, 1).contiguous())
        here_R = (targets_R >= self.start) & (targets_R < self.start + self.bounds[-1])
        local_R = torch.where(here_R, targets_R - self.start, -1)
        if self.bounds[-1]:
            own_R = logits_RV.gather(1, local_R.clamp(min=0)[:, None])[:, 0]
            own_R = torch.where(here_R, own_R, -0.0)  # to which adding a number gives just that number
        else:
            own_R = torch.full_like(lse_R, -0.0)
        own_R = self.group.all_reduce(own_R, "cross_entropy")
        return own_R - lse_R, lse_R, local_R


class LogProbability(Function):
    """log p(target) of logits."""

    @staticmethod
    def forward(ctx: Any, ops: Ops, logits_RV: Tensor, targets_R: Tensor, part: VocabPart) -> Tensor:
        logits_RV = logits_RV.detach()
        logprob_R, lse_R, local_R = part.log_probabilities(ops, logits_RV, targets_R)
        ctx.save_for_backward(logits_RV, lse_R, local_R)
        ctx.ops = ops
        return logprob_R

    @staticmethod
    def backward(ctx: Any, g_R: Tensor) -> tuple[Tensor | None, ...]:
        logits_RV, lse_R, local_R = ctx.saved_tensors
        g_logits = logits_RV.clone()
        ctx.ops.cross_entropy_backward_(g_logits, lse_R, local_R, g_R.contiguous())
        return None, g_logits, None, None


class HeadLoss(Function):
    """Σ weight · log p(target) of hidden rows, a chunk of logits at a time.

    The gradients are made on the way forward, while a chunk's logits exist; backward only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any, ops: Any, x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, weight_R: Tensor, part: VocabPart
    ) -> tuple[Tensor, Tensor]:
        x_RD, weight_VD = x_RD.detach(), weight_VD.detach()
        _, wants_x, wants_weight, *_ = ctx.needs_input_grad
        logprob_R = torch.empty(len(x_RD), device=x_RD.device)
        g_x = torch.empty_like(x_RD) if wants_x else None
        g_weight = torch.zeros(weight_VD.shape, device=x_RD.device) if wants_weight else None
        spans = tuple((shard, a, a, b - a) for shard, (a, b) in enumerate(pairwise(part.bounds)))
        for start in range(0, len(x_RD), CHUNK):
            rows = slice(start, start + CHUNK)
            x_rD, g_r = x_RD[rows], weight_R[rows]
            logits_rV = ops.base.linear(x_rD, weight_VD)
            logprob_R[rows], lse_r, local_r = part.log_probabilities(ops.base, logits_rV, targets_R[rows])
            if g_x is None and g_weight is None:
                continue
            ops.base.cross_entropy_backward_(logits_rV, lse_r, local_r, g_r)
            if g_weight is not None:
                ops.base.linear_backward_weight(logits_rV, x_rD, g_weight)
            if g_x is not None:
                g_x[rows] = ops.base.linear_backward_input(logits_rV, weight_VD, spans)
        ctx.g_x, ctx.g_weight, ctx.dtype = g_x, g_weight, weight_VD.dtype
        ctx.mark_non_differentiable(logprob_R)
        return (logprob_R.double() * weight_R.double()).sum(), logprob_R

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale = float(g)
        grads = [grad if grad is None or scale == 1.0 else grad.mul_(scale) for grad in (ctx.g_x, ctx.g_weight)]
        ctx.g_x = ctx.g_weight = None
        return None, grads[0], None if grads[1] is None else grads[1].to(ctx.dtype), None, None, None
