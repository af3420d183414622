"""`CudaOps`: the reference ops on a GPU, with Triton kernels in the slots that have one."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from headrace.kernels.cuda.rms_norm import rms_norm
from headrace.kernels.delegate import DelegatingOps
from headrace.kernels.reference import ReferenceOps

__all__ = ["CudaOps"]


class CudaOps(DelegatingOps):
    """`headrace.kernels.training.TrainingOps` on `device`: what has no Triton kernel yet is the reference's own."""

    name = "cuda"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        super().__init__(ReferenceOps(device))

    def fingerprint(self) -> str:
        """The reference's, and Triton's version."""
        return f"{self.name}/triton-{triton.__version__}/{self.base.fingerprint()}"

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return rms_norm(x_TD, weight_D, eps)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        sum_TD = x_TD + residual_TD
        return rms_norm(sum_TD, weight_D, eps), sum_TD
