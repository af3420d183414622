"""The op set with gradients: what trains."""

from headrace.kernels.autograd.ops import AutogradOps

__all__ = ["AutogradOps"]
