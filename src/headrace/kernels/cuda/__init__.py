"""Triton kernels for NVIDIA GPUs, filling the reference ops' slots one by one."""

from headrace.kernels.cuda.ops import CudaOps

__all__ = ["CudaOps"]
