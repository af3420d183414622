"""The op set in plain torch: what each operation means, on any device."""

from headrace.kernels.reference.ops import ReferenceOps

__all__ = ["ReferenceOps"]
