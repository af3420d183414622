"""The next task of a shared counter, and aligned workspace."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.simd import intrinsic

__all__ = ["scratch", "take"]


@intrinsic
def take(tyctx: Any, counter: Any) -> Any:
    """++ of the int64 at this address, atomically: the next work item. Which thread takes it changes no bits."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        word = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), codegen


@kernel
def scratch(size):
    """fp32 workspace, and the offset at which a cache line starts in it."""
    array = np.empty(size + 16, np.float32)
    return array, -(array.ctypes.data // 4) % 16
