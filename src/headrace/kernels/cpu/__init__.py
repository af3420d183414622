"""The op set in Numba: compiled on the user's machine, bit-identical whatever the batch or the thread count."""

from headrace.kernels.cpu.ops import CpuOps

__all__ = ["CpuOps"]
