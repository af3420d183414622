"""Sixteen fp32 lanes, for what is done to each element alone: one 512-bit register of a CPU with AVX-512.

Without it LLVM makes two 256-bit instructions of one. No operation mixes lanes, so `exp16` has the bits of `simd`'s.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import models, register_model

from headrace.kernels.cpu.memory import address, emit_load
from headrace.kernels.cpu.simd import (
    FLOAT,
    LANES,
    emit_exp,
    emit_select,
    emit_splat,
    f32x8,
    intrinsic,
    mask,
    operator,
)

__all__ = [
    "exp16",
    "high8",
    "load16",
    "low8",
    "max16",
    "mul16",
    "splat16",
    "store16",
    "sub16",
    "zero16",
]

WIDE = ir.VectorType(FLOAT, 2 * LANES)


class F32x16(types.Type):
    """The Numba type of sixteen fp32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = F32x16()


@register_model(F32x16)
class _F32x16Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, WIDE)


def _half(first: int) -> Any:
    return lambda builder, v: builder.shuffle_vector(v, v, mask(*range(first, first + LANES)))


zero16 = operator("zero16", 0, lambda builder: ir.Constant(WIDE, [0.0] * 2 * LANES), f32x16, f32x16)
splat16 = operator("splat16", 1, lambda builder, x: emit_splat(builder, x, 2 * LANES), types.float32, f32x16)
mul16 = operator("mul16", 2, lambda builder, a, b: builder.fmul(a, b), f32x16, f32x16)
sub16 = operator("sub16", 2, lambda builder, a, b: builder.fsub(a, b), f32x16, f32x16)
max16 = operator("max16", 2, emit_select(">"), f32x16, f32x16)
exp16 = operator("exp16", 1, emit_exp, f32x16, f32x16)
low8 = operator("low8", 1, _half(0), f32x16, f32x8)
high8 = operator("high8", 1, _half(LANES), f32x16, f32x8)


@intrinsic
def load16(tyctx: Any, array: Any, offset: Any) -> Any:
    """Sixteen elements from `offset`, unaligned, as fp32."""
    return emit_load(lambda element: ir.VectorType(element, 2 * LANES), f32x16)(tyctx, array, offset)


@intrinsic
def store16(tyctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """Sixteen fp32 elements to `offset`, unaligned."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[2], address(context, builder, array, args[0], args[1], WIDE), align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, f32x16), codegen
