"""Choosing an implementation of the op set by name."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from headrace.errors import ConfigError
from headrace.kernels.training import TrainingOps

__all__ = ["load_ops"]


def load_ops(name: str, **options: Any) -> TrainingOps:
    """The implementation called `name`: "cpu" (Numba), "reference" (torch) or "cuda" (torch, and Triton if there)."""
    if name == "cpu":
        from headrace.kernels.cpu import CpuOps

        return CpuOps(**options)
    if name == "reference":
        from headrace.kernels.reference import ReferenceOps

        return ReferenceOps(**options)
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch sees no GPU: use device=cpu, or install a CUDA build of torch")
        if importlib.util.find_spec("triton") is None:
            from headrace.kernels.reference import ReferenceOps

            return ReferenceOps("cuda", **options)
        from headrace.kernels.cuda import CudaOps

        return CudaOps(**options)
    raise ConfigError(f"kernels={name!r} is not one of cpu, reference, cuda")
