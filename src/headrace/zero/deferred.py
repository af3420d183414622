"""`DeferredOps`: a model whose matrices get their memory from `Sharded`, which divides them among copies."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.autograd import AutogradOps

__all__ = ["DeferredOps"]


class DeferredOps(AutogradOps):
    """`AutogradOps` whose matrices have a shape but no memory of their own: one element stands for all."""

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(1, 1, dtype=dtype, device=self.device).expand(rows, columns)
