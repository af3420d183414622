"""Eight fp32 lanes as a Numba type: norms, softmax sums and attention's scores are written with these, lane by lane.

Numba has no vector type, and leaving the shape of a sum to LLVM's vectoriser (`fastmath`) would let it change with
the loop around it. Here the shape is explicit: an accumulator is eight lanes, lane i summing elements i, i + 8, …
with one rounding each (`fma8`), and `hsum8` adds the lanes at distance 4, then 2, then 1. Products add nothing across
lanes.

    acc = zero8()
    for k in range(0, n - n % 8, 8):
        acc = fma8(load8(x, k), load8(w, k), acc)
    acc = fma8(load8n(x, k0, n % 8), load8n(w, k0, n % 8), acc)     # tail: missing lanes are 0
    total = hsum8(acc)

All arithmetic is fp32 and IEEE: no fast-math flag is set anywhere. Names end in 8 for a vector and in 1 for a scalar;
`exp1` and `exp8`, `log1` and `log8` give equal bits lane by lane, and the scalar forms vectorise when a plain loop is
built on them. Loads and stores are in `memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.extending import models, register_model

__all__ = [
    "LANES",
    "abs8",
    "add8",
    "div8",
    "exp1",
    "exp8",
    "fma1",
    "fma8",
    "hmax8",
    "hsum8",
    "log1",
    "log8",
    "max8",
    "min8",
    "mul8",
    "splat8",
    "sqrt8",
    "sub8",
    "zero8",
]

LANES = 8

intrinsic: Any = extending.intrinsic  # as Any: by its annotation a kernel would pass the typing context too
FLOAT = ir.FloatType()
I32 = ir.IntType(32)
VECTOR = ir.VectorType(FLOAT, LANES)


class F32x8(types.Type):
    """The Numba type of eight fp32 lanes in one register. It lives inside kernels only."""

    def __init__(self) -> None:
        super().__init__(name="f32x8")


f32x8 = F32x8()


@register_model(F32x8)
class _F32x8Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, VECTOR)


# ---- emitting LLVM ---------------------------------------------------------------------------------------------


def constant(like: ir.Type, value: float | int) -> ir.Constant:
    """`value` in the shape of the LLVM type `like`: the same in every lane of a vector."""
    element = like.element if isinstance(like, ir.VectorType) else like
    value = float(np.float32(value)) if element == FLOAT else value
    one = ir.Constant(element, value)
    return ir.Constant(like, [one] * like.count) if isinstance(like, ir.VectorType) else one


def integers_like(like: ir.Type, bits: int = 32) -> ir.Type:
    element = ir.IntType(bits)
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    name = f"llvm.fma.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def mask(*lanes: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))


def operator(name: str, arity: int, emit: Callable[..., ir.Value], arg: types.Type, ret: types.Type) -> Any:
    """An intrinsic `ret name(arg, …)` whose body is emit(builder, *values)."""
    signature = ret(*[arg] * arity)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return emit(builder, *args)

    forms = {
        0: lambda tyctx: (signature, codegen),
        1: lambda tyctx, a: (signature, codegen),
        2: lambda tyctx, a, b: (signature, codegen),
        3: lambda tyctx, a, b, c: (signature, codegen),
        5: lambda tyctx, a, b, c, d, e: (signature, codegen),
        8: lambda tyctx, a, b, c, d, e, f, g, h: (signature, codegen),
    }
    form = forms[arity]
    form.__name__ = form.__qualname__ = name
    return intrinsic(form)


def emit_select(predicate: str) -> Callable[..., ir.Value]:
    """a if a `predicate` b else b: one instruction (minps, maxps) on x86."""
    return lambda builder, a, b: builder.select(builder.fcmp_ordered(predicate, a, b), a, b)


def emit_splat(builder: ir.IRBuilder, x: ir.Value, lanes: int = LANES) -> ir.Value:
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), x, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), mask(*[0] * lanes))


def emit_fold(combine: Callable[..., ir.Value]) -> Callable[..., ir.Value]:
    """Combine the lanes at distance 4, then 2, then 1."""

    def emit(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
        for half in (4, 2, 1):
            low = builder.shuffle_vector(v, v, mask(*range(half)))
            high = builder.shuffle_vector(v, v, mask(*range(half, 2 * half)))
            v = combine(builder, low, high)
        return builder.extract_element(v, ir.Constant(I32, 0))

    return emit


def emit_exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x in about 1 ulp: x = n·ln2 + r, a polynomial of degree 7 in r, then two exact scalings by powers of two."""
    like, ints = x.type, integers_like(x.type)
    x = builder.select(builder.fcmp_ordered("<", x, constant(like, -105.0)), constant(like, -105.0), x)
    x = builder.select(builder.fcmp_ordered(">", x, constant(like, 89.0)), constant(like, 89.0), x)
    magic = constant(like, 12582912.0)  # 1.5·2²³: adding it leaves round(x / ln2) in the low bits
    shifted = emit_fma(builder, x, constant(like, 1.44269504088896341), magic)
    n = builder.fsub(shifted, magic)
    r = emit_fma(builder, n, constant(like, -0.693359375), x)
    r = emit_fma(builder, n, constant(like, 2.12194440e-4), r)
    p = constant(like, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = emit_fma(builder, p, r, constant(like, c))
    y = builder.fadd(emit_fma(builder, builder.fmul(r, r), p, r), constant(like, 1.0))
    whole = builder.sub(builder.bitcast(shifted, ints), builder.bitcast(magic, ints))
    first = builder.ashr(whole, constant(ints, 1))  # in two halves, so that results may be subnormal or infinite
    for part in (first, builder.sub(whole, first)):
        scale = builder.shl(builder.add(part, constant(ints, 127)), constant(ints, 23))
        y = builder.fmul(y, builder.bitcast(scale, like))
    return y


def _log(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """ln x in about 1 ulp: x = 2^k·(1 + f) with √½ ≤ 1 + f < √2, then an odd series in f / (2 + f)."""
    like, ints = x.type, integers_like(x.type)
    tiny = builder.fcmp_ordered("<", x, constant(like, 1.17549435e-38))
    scaled = builder.select(tiny, builder.fmul(x, constant(like, 8388608.0)), x)
    bits = builder.add(builder.bitcast(scaled, ints), constant(ints, 0x3F800000 - 0x3F3504F3))
    k = builder.sub(builder.ashr(bits, constant(ints, 23)), constant(ints, 127))
    k = builder.sub(k, builder.select(tiny, constant(ints, 23), constant(ints, 0)))
    k = builder.sitofp(k, like)
    bits = builder.add(builder.and_(bits, constant(ints, 0x7FFFFF)), constant(ints, 0x3F3504F3))
    f = builder.fsub(builder.bitcast(bits, like), constant(like, 1.0))
    s = builder.fdiv(f, builder.fadd(f, constant(like, 2.0)))
    z = builder.fmul(s, s)
    p = constant(like, 0.24279078841)
    for c in (0.28498786688, 0.40000972152, 0.66666662693):
        p = emit_fma(builder, p, z, constant(like, c))
    half = builder.fmul(builder.fmul(f, f), constant(like, 0.5))
    y = emit_fma(builder, k, constant(like, 9.0580006145e-6), builder.fmul(s, emit_fma(builder, p, z, half)))
    y = emit_fma(builder, k, constant(like, 6.9313812256e-1), builder.fadd(builder.fsub(y, half), f))
    y = builder.select(builder.fcmp_ordered("<", x, constant(like, float("inf"))), y, x)  # +inf and nan
    y = builder.select(builder.fcmp_ordered("<", x, constant(like, 0.0)), constant(like, float("nan")), y)
    return builder.select(builder.fcmp_ordered("==", x, constant(like, 0.0)), constant(like, float("-inf")), y)


# ---- arithmetic ------------------------------------------------------------------------------------------------

zero8 = operator("zero8", 0, lambda builder: constant(VECTOR, 0.0), f32x8, f32x8)
splat8 = operator("splat8", 1, emit_splat, types.float32, f32x8)
add8 = operator("add8", 2, lambda builder, a, b: builder.fadd(a, b), f32x8, f32x8)
sub8 = operator("sub8", 2, lambda builder, a, b: builder.fsub(a, b), f32x8, f32x8)
mul8 = operator("mul8", 2, lambda builder, a, b: builder.fmul(a, b), f32x8, f32x8)
div8 = operator("div8", 2, lambda builder, a, b: builder.fdiv(a, b), f32x8, f32x8)
max8 = operator("max8", 2, emit_select(">"), f32x8, f32x8)
min8 = operator("min8", 2, emit_select("<"), f32x8, f32x8)
fma8 = operator("fma8", 3, emit_fma, f32x8, f32x8)
fma1 = operator("fma1", 3, emit_fma, types.float32, types.float32)
sqrt8 = operator(
    "sqrt8",
    1,
    lambda builder, a: builder.call(
        cgutils.get_or_insert_function(builder.module, ir.FunctionType(VECTOR, [VECTOR]), "llvm.sqrt.v8f32"), [a]
    ),
    f32x8,
    f32x8,
)
exp8 = operator("exp8", 1, emit_exp, f32x8, f32x8)
exp1 = operator("exp1", 1, emit_exp, types.float32, types.float32)
log8 = operator("log8", 1, _log, f32x8, f32x8)
log1 = operator("log1", 1, _log, types.float32, types.float32)
hsum8 = operator("hsum8", 1, emit_fold(lambda builder, a, b: builder.fadd(a, b)), f32x8, types.float32)
hmax8 = operator("hmax8", 1, emit_fold(emit_select(">")), f32x8, types.float32)
abs8 = operator(
    "abs8",
    1,
    lambda builder, a: builder.bitcast(
        builder.and_(builder.bitcast(a, integers_like(VECTOR)), constant(integers_like(VECTOR), 0x7FFFFFFF)), VECTOR
    ),
    f32x8,
    f32x8,
)
