"""Two eight-lane accumulators in one 512-bit register, for CPUs with AVX-512: twice the rate, the same sums.

Lanes 0–7 belong to one row and lanes 8–15 to another; no operation mixes them. So an output computed here
has the bits that eight lanes of `simd` give it. What is done to each element alone (`exp16`, a value's `fma16`) may
take sixteen elements of one row; without AVX-512 LLVM makes two 256-bit instructions of one.
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
    VECTOR,
    emit_exp,
    emit_fma,
    emit_select,
    emit_splat,
    emit_sums,
    f32x8,
    intrinsic,
    mask,
    operator,
)

__all__ = [
    "add16",
    "exp16",
    "fma16",
    "high8",
    "hsum16x8",
    "load16",
    "low8",
    "max16",
    "mul16",
    "splat16",
    "store16",
    "store_quarter",
    "sub16",
    "twice8",
    "zero16",
]

WIDE = ir.VectorType(FLOAT, 2 * LANES)


class F32x16(types.Type):
    """The Numba type of two rows' eight fp32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = F32x16()


@register_model(F32x16)
class _F32x16Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, WIDE)


def _half(first: int) -> Any:
    return lambda builder, v: builder.shuffle_vector(v, v, mask(*range(first, first + LANES)))


def _hsum16x8(builder: ir.IRBuilder, *a: ir.Value) -> ir.Value:
    """Lane i is hsum8 of a[i]'s first row, lane 8 + i of its second."""

    def both(x: ir.Value, y: ir.Value, lanes: tuple[int, ...]) -> ir.Value:
        # Lanes of x are 0–7 and of y 8–15 within a row's half of the register.
        first = [lane if lane < LANES else lane + LANES for lane in lanes]
        return builder.shuffle_vector(x, y, mask(*first, *(lane + LANES for lane in first)))

    return emit_sums(builder, a, both)


zero16 = operator("zero16", 0, lambda builder: ir.Constant(WIDE, [0.0] * 2 * LANES), f32x16, f32x16)
splat16 = operator("splat16", 1, lambda builder, x: emit_splat(builder, x, 2 * LANES), types.float32, f32x16)
add16 = operator("add16", 2, lambda builder, a, b: builder.fadd(a, b), f32x16, f32x16)
fma16 = operator("fma16", 3, emit_fma, f32x16, f32x16)
mul16 = operator("mul16", 2, lambda builder, a, b: builder.fmul(a, b), f32x16, f32x16)
sub16 = operator("sub16", 2, lambda builder, a, b: builder.fsub(a, b), f32x16, f32x16)
max16 = operator("max16", 2, emit_select(">"), f32x16, f32x16)
exp16 = operator("exp16", 1, emit_exp, f32x16, f32x16)
low8 = operator("low8", 1, _half(0), f32x16, f32x8)
high8 = operator("high8", 1, _half(LANES), f32x16, f32x8)
hsum16x8 = operator("hsum16x8", 8, _hsum16x8, f32x16, f32x16)
twice8 = operator(
    "twice8",
    1,
    lambda builder, v: builder.shuffle_vector(v, ir.Constant(VECTOR, ir.Undefined), mask(*range(LANES), *range(LANES))),
    f32x8,
    f32x16,
)


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


@intrinsic
def store_quarter(tyctx: Any, array: Any, offset: Any, value: Any, quarter: Any) -> Any:
    """Lanes 4·quarter … 4·quarter + 3 (`quarter` a literal 0 … 3) to four fp32 elements at `offset`."""
    if not isinstance(quarter, types.IntegerLiteral):
        return None
    lanes = mask(*range(4 * quarter.literal_value, 4 * quarter.literal_value + 4))
    four = ir.VectorType(FLOAT, 4)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        piece = builder.shuffle_vector(args[2], ir.Constant(WIDE, ir.Undefined), lanes)
        builder.store(piece, address(context, builder, array, args[0], args[1], four), align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, f32x16, quarter), codegen
