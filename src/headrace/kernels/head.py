"""Scoring tokens of a vocabulary that ranks share (Megatron-LM §3): they exchange scalars, never logits.

R rows   r rows of one chunk   V this rank's part of the vocabulary   S its shards   D hidden
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headrace.kernels.ops import Ops
from headrace.kernels.vocab import VocabPart

__all__ = ["CHUNK", "head_chunks", "log_probabilities"]

CHUNK = 512
"""Rows whose logits exist at once, a multiple of the 256 whose products are summed alone."""


def log_probabilities(ops: Ops, logits_RV: Tensor, targets_R: Tensor, part: VocabPart) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target) [R], log-sum-exp [R], the targets within `part`, −1 where they are elsewhere)."""
    parts_SR2 = ops.logsumexp_parts(logits_RV, part.bounds).transpose(0, 1).contiguous()
    parts_SR2 = part.group.all_gather(parts_SR2, "cross_entropy")
    lse_R = ops.merge_logsumexp(parts_SR2.transpose(0, 1).contiguous())
    here_R = (targets_R >= part.start) & (targets_R < part.start + part.bounds[-1])
    local_R = torch.where(here_R, targets_R - part.start, -1)
    if part.bounds[-1]:
        own_R = logits_RV.gather(1, local_R.clamp(min=0)[:, None])[:, 0]
        own_R = torch.where(here_R, own_R, -0.0)  # to which adding a number gives just that number
    else:
        own_R = torch.full_like(lse_R, -0.0)
    own_R = part.group.all_reduce(own_R, "cross_entropy")
    return own_R - lse_R, lse_R, local_R


def head_chunks(
    ops: Ops, x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, part: VocabPart
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """For every `CHUNK` rows: (the rows, their logits, and what `log_probabilities` gives for them)."""
    for start in range(0, len(x_RD), CHUNK):
        rows = slice(start, start + CHUNK)
        logits_rV = ops.linear(x_RD[rows], weight_VD)
        yield rows, logits_rV, *log_probabilities(ops, logits_rV, targets_R[rows], part)
