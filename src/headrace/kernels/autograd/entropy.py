"""Cross-entropy that trains, over a vocabulary that ranks share. Shapes are those of `headrace.kernels.vocab`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from headrace.kernels.head import head_chunks, log_probabilities
from headrace.kernels.training import TrainingOps
from headrace.kernels.vocab import VocabPart

__all__ = ["HeadLoss", "LogProbability"]


class LogProbability(Function):
    """log p(target) of logits."""

    @staticmethod
    def forward(ctx: Any, ops: TrainingOps, logits_RV: Tensor, targets_R: Tensor, part: VocabPart) -> Tensor:
        logits_RV = logits_RV.detach()
        logprob_R, lse_R, local_R = log_probabilities(ops, logits_RV, targets_R, part)
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
        ctx: Any,
        base: TrainingOps,
        x_RD: Tensor,
        weight_VD: Tensor,
        targets_R: Tensor,
        weight_R: Tensor,
        part: VocabPart,
    ) -> tuple[Tensor, Tensor]:
        x_RD, weight_VD = x_RD.detach(), weight_VD.detach()
        _, wants_x, wants_weight, *_ = ctx.needs_input_grad
        logprob_R = torch.empty(len(x_RD), device=x_RD.device)
        g_x = torch.empty_like(x_RD) if wants_x else None
        g_weight = torch.zeros(weight_VD.shape, device=x_RD.device) if wants_weight else None
        spans = tuple((shard, a, a, b - a) for shard, (a, b) in enumerate(pairwise(part.bounds)))
        for rows, logits_rV, logprob_r, lse_r, local_r in head_chunks(base, x_RD, weight_VD, targets_R, part):
            logprob_R[rows] = logprob_r
            if g_x is None and g_weight is None:
                continue
            base.cross_entropy_backward_(logits_rV, lse_r, local_r, weight_R[rows])
            if g_weight is not None:
                base.linear_backward_weight(logits_rV, x_RD[rows], g_weight)
            if g_x is not None:
                g_x[rows] = base.linear_backward_input(logits_rV, weight_VD, spans)
        ctx.g_x, ctx.g_weight, ctx.dtype = g_x, g_weight, weight_VD.dtype
        ctx.mark_non_differentiable(logprob_R)
        return (logprob_R.double() * weight_R.double()).sum(), logprob_R

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale = float(g)
        grads = [grad if grad is None or scale == 1.0 else grad.mul_(scale) for grad in (ctx.g_x, ctx.g_weight)]
        ctx.g_x = ctx.g_weight = None
        return None, grads[0], None if grads[1] is None else grads[1].to(ctx.dtype), None, None, None
