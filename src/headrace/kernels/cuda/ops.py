"""`CudaOps`: the reference ops on a GPU, with Triton kernels in the slots that have one."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from headrace.kernels.cuda.rms_norm import rms_norm
from headrace.kernels.reference import ReferenceOps

__all__ = ["CudaOps"]


class CudaOps:
    """`headrace.kernels.ops.Ops` on `device`: what has no Triton kernel yet is the reference's own."""

    name = "cuda"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        base = ReferenceOps(device)
        self.device = base.device
        self._base_fingerprint = base.fingerprint
        self.warm_up = base.warm_up
        self.embedding = base.embedding
        self.linear = base.linear
        self.rotary = base.rotary
        self.silu_mul = base.silu_mul
        self.store_kv_ = base.store_kv_
        self.attention = base.attention
        self.logsumexp = base.logsumexp
        self.score = base.score
        self.top_logprobs = base.top_logprobs
        self.edit_logits_ = base.edit_logits_
        self.mask_logits_ = base.mask_logits_
        self.sample = base.sample
        self.copy_blocks_ = base.copy_blocks_

    def fingerprint(self) -> str:
        """The reference's, and Triton's version."""
        return f"{self.name}/triton-{triton.__version__}/{self._base_fingerprint()}"

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return rms_norm(x_TD, weight_D, eps)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor,
                     eps: float) -> tuple[Tensor, Tensor]:
        sum_TD = x_TD + residual_TD
        return rms_norm(sum_TD, weight_D, eps), sum_TD
