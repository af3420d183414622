"""Eight fp64 lanes, for sums of squares of fp32: the norm of all gradients is added up in these.

The square of an fp32 value is exact in fp64, so a lane rounds once an element, with a fused multiply-add or without.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import models, register_model

from headrace.kernels.cpu.simd import LANES, emit_fold, f32x8, intrinsic, operator

__all__ = ["add_squares8d", "hsum8d", "zero8d"]

DOUBLES = ir.VectorType(ir.DoubleType(), LANES)


class F64x8(types.Type):
    """The Numba type of eight fp64 lanes."""

    def __init__(self) -> None:
        super().__init__(name="f64x8")


f64x8 = F64x8()


@register_model(F64x8)
class _F64x8Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, DOUBLES)


zero8d = operator("zero8d", 0, lambda builder: ir.Constant(DOUBLES, [0.0] * LANES), f64x8, f64x8)
hsum8d = operator("hsum8d", 1, emit_fold(lambda builder, a, b: builder.fadd(a, b)), f64x8, types.float64)


@intrinsic
def add_squares8d(tyctx: Any, acc: Any, x: Any) -> Any:
    """acc + x² lane by lane, of fp32 lanes x."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        wide = builder.fpext(args[1], DOUBLES)
        return builder.fadd(args[0], builder.fmul(wide, wide))

    return f64x8(f64x8, f32x8), codegen
