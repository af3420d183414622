"""Eight fp32 lanes as a Numba type: every reduction of the CPU kernels is written with these, lane by lane.

Numba has no vector type, and leaving the shape of a sum to LLVM's vectoriser (`fastmath`) would let it change with
the loop around it. Here the shape is explicit: an accumulator is eight lanes, lane i summing elements i, i + 8, …
with one rounding each (`fma8`), and `hsum8` adds the lanes at distance 4, then 2, then 1. A tile of R rows × N
outputs is R·N such accumulators, so every tile gives equal bits, by construction.

    acc = zero8()
    for k in range(0, n - n % 8, 8):
        acc = fma8(load8(x, k), load8(w, k), acc)
    acc = fma8(load8n(x, k0, n % 8), load8n(w, k0, n % 8), acc)     # tail: missing lanes are 0
    total = hsum8(acc)

Loads and stores take an array of any rank, or the `pointer` of one, and an offset **in elements from its data
pointer**, without bounds checks. Inside a hot function take pointers: an array is reference-counted, which costs
two atomic operations and a spill of every register around them. The dtype says how elements are read:

    float32   fp32            uint16   bfloat16            int16   float16

All arithmetic is fp32 and IEEE: no fast-math flag is set anywhere. Names end in 8 for a vector and in 1 for a
scalar; `exp1` and `exp8`, `log1` and `log8` give equal bits lane by lane, and the scalar forms vectorise when a
plain loop is built on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    "hsum8x8",
    "load1",
    "load8",
    "load8n",
    "log1",
    "log8",
    "max8",
    "min8",
    "mul8",
    "narrow",
    "pointer",
    "prefetch",
    "splat8",
    "sqrt8",
    "store1",
    "store8",
    "store8n",
    "store_lanes",
    "sub8",
    "widest",
    "zero8",
]

LANES = 8

intrinsic: Any = extending.intrinsic  # as Any: by its annotation a kernel would pass the typing context too
FLOAT = ir.FloatType()
I16 = ir.IntType(16)
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


def _const(like: ir.Type, value: float | int) -> ir.Constant:
    """`value` in the shape of the LLVM type `like`: the same in every lane of a vector."""
    element = like.element if isinstance(like, ir.VectorType) else like
    value = float(np.float32(value)) if element == FLOAT else value
    one = ir.Constant(element, value)
    return ir.Constant(like, [one] * like.count) if isinstance(like, ir.VectorType) else one


def _integers(like: ir.Type, bits: int = 32) -> ir.Type:
    element = ir.IntType(bits)
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


def _halves(like: ir.Type) -> ir.Type:
    return ir.VectorType(ir.HalfType(), like.count) if isinstance(like, ir.VectorType) else ir.HalfType()


def _floats(like: ir.Type) -> ir.Type:
    return ir.VectorType(FLOAT, like.count) if isinstance(like, ir.VectorType) else FLOAT


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


FOLDS = (
    ((0, 1, 2, 3, 12, 13, 14, 15), (4, 5, 6, 7, 8, 9, 10, 11)),
    ((0, 1, 10, 11, 4, 5, 14, 15), (2, 3, 8, 9, 6, 7, 12, 13)),
    ((0, 9, 2, 11, 4, 13, 6, 15), (1, 8, 3, 10, 5, 12, 7, 14)),
)
"""Lanes of x (0–7) and y (8–15) that stay, which is a blend, and those shuffled to be added, by distance: 4, 2, 1."""


def emit_sums(builder: ir.IRBuilder, rows: Sequence[ir.Value], both: Callable[..., ir.Value]) -> ir.Value:
    """Lane i is hsum8 of eight `rows`' i-th, with hsum8's own additions; both(x, y, lanes) picks lanes of two."""
    for stays, comes in FOLDS:
        rows = [builder.fadd(both(x, y, stays), both(x, y, comes)) for x, y in zip(rows, rows[len(rows) // 2 :])]
    return rows[0]


def emit_exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x in about 1 ulp: x = n·ln2 + r, a polynomial of degree 7 in r, then two exact scalings by powers of two."""
    like, ints = x.type, _integers(x.type)
    x = builder.select(builder.fcmp_ordered("<", x, _const(like, -105.0)), _const(like, -105.0), x)
    x = builder.select(builder.fcmp_ordered(">", x, _const(like, 89.0)), _const(like, 89.0), x)
    magic = _const(like, 12582912.0)  # 1.5·2²³: adding it leaves round(x / ln2) in the low bits
    shifted = emit_fma(builder, x, _const(like, 1.44269504088896341), magic)
    n = builder.fsub(shifted, magic)
    r = emit_fma(builder, n, _const(like, -0.693359375), x)
    r = emit_fma(builder, n, _const(like, 2.12194440e-4), r)
    p = _const(like, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = emit_fma(builder, p, r, _const(like, c))
    y = builder.fadd(emit_fma(builder, builder.fmul(r, r), p, r), _const(like, 1.0))
    whole = builder.sub(builder.bitcast(shifted, ints), builder.bitcast(magic, ints))
    first = builder.ashr(whole, _const(ints, 1))  # in two halves, so that results may be subnormal or infinite
    for part in (first, builder.sub(whole, first)):
        scale = builder.shl(builder.add(part, _const(ints, 127)), _const(ints, 23))
        y = builder.fmul(y, builder.bitcast(scale, like))
    return y


def _log(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """ln x in about 1 ulp: x = 2^k·(1 + f) with √½ ≤ 1 + f < √2, then an odd series in f / (2 + f)."""
    like, ints = x.type, _integers(x.type)
    tiny = builder.fcmp_ordered("<", x, _const(like, 1.17549435e-38))
    scaled = builder.select(tiny, builder.fmul(x, _const(like, 8388608.0)), x)
    bits = builder.add(builder.bitcast(scaled, ints), _const(ints, 0x3F800000 - 0x3F3504F3))
    k = builder.sub(builder.ashr(bits, _const(ints, 23)), _const(ints, 127))
    k = builder.sub(k, builder.select(tiny, _const(ints, 23), _const(ints, 0)))
    k = builder.sitofp(k, like)
    bits = builder.add(builder.and_(bits, _const(ints, 0x7FFFFF)), _const(ints, 0x3F3504F3))
    f = builder.fsub(builder.bitcast(bits, like), _const(like, 1.0))
    s = builder.fdiv(f, builder.fadd(f, _const(like, 2.0)))
    z = builder.fmul(s, s)
    p = _const(like, 0.24279078841)
    for c in (0.28498786688, 0.40000972152, 0.66666662693):
        p = emit_fma(builder, p, z, _const(like, c))
    half = builder.fmul(builder.fmul(f, f), _const(like, 0.5))
    y = emit_fma(builder, k, _const(like, 9.0580006145e-6), builder.fmul(s, emit_fma(builder, p, z, half)))
    y = emit_fma(builder, k, _const(like, 6.9313812256e-1), builder.fadd(builder.fsub(y, half), f))
    y = builder.select(builder.fcmp_ordered("<", x, _const(like, float("inf"))), y, x)  # +inf and nan
    y = builder.select(builder.fcmp_ordered("<", x, _const(like, 0.0)), _const(like, float("nan")), y)
    return builder.select(builder.fcmp_ordered("==", x, _const(like, 0.0)), _const(like, float("-inf")), y)


# ---- arithmetic ------------------------------------------------------------------------------------------------

zero8 = operator("zero8", 0, lambda builder: _const(VECTOR, 0.0), f32x8, f32x8)
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
hsum8x8 = operator(
    "hsum8x8",
    8,
    lambda builder, *a: emit_sums(builder, a, lambda x, y, lanes: builder.shuffle_vector(x, y, mask(*lanes))),
    f32x8,
    f32x8,
)
abs8 = operator(
    "abs8",
    1,
    lambda builder, a: builder.bitcast(
        builder.and_(builder.bitcast(a, _integers(VECTOR)), _const(_integers(VECTOR), 0x7FFFFFFF)), VECTOR
    ),
    f32x8,
    f32x8,
)


# ---- memory ----------------------------------------------------------------------------------------------------

STORED = {types.float32: FLOAT, types.uint16: I16, types.int16: I16}


def address(
    context: Any, builder: ir.IRBuilder, source: Any, value: ir.Value, offset: ir.Value, to: ir.Type
) -> ir.Value:
    """LLVM pointer to element `offset` of an array or `pointer`, typed as `to`."""
    data = (
        value
        if isinstance(source, types.CPointer)
        else cgutils.create_struct_proxy(source)(context, builder, value=value).data
    )
    return builder.bitcast(builder.gep(data, [offset]), to.as_pointer())


def _widen(builder: ir.IRBuilder, dtype: types.Type, raw: ir.Value) -> ir.Value:
    """fp32 of what was read: exact for all three formats."""
    if dtype == types.float32:
        return raw
    if dtype == types.int16:
        like = _halves(raw.type)
        return builder.fpext(builder.bitcast(raw, like), _floats(like))
    ints = _integers(raw.type)
    wide = builder.shl(builder.zext(raw, ints), _const(ints, 16))
    return builder.bitcast(wide, _floats(ints))


def _narrow(builder: ir.IRBuilder, dtype: types.Type, value: ir.Value) -> ir.Value:
    """Round to nearest, ties to even, into the stored format. NaN stays NaN (torch's own bf16 NaN, 0x7fc0)."""
    if dtype == types.float32:
        return value
    if dtype == types.int16:
        half = builder.fptrunc(value, _halves(value.type))
        return builder.bitcast(half, _integers(value.type, 16))
    ints = _integers(value.type)
    bits = builder.bitcast(value, ints)
    odd = builder.and_(builder.lshr(bits, _const(ints, 16)), _const(ints, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _const(ints, 0x7FFF))), _const(ints, 16))
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), _const(ints, 0x7FC0), rounded)
    return builder.trunc(rounded, _integers(value.type, 16))


def _known(array: Any) -> bool:
    return isinstance(array, (types.Array, types.CPointer)) and array.dtype in STORED


@intrinsic
def pointer(tyctx: Any, array: Any) -> Any:
    """The array's data pointer, which is not reference-counted: somebody else keeps the array.

    A local array is freed with its last mention: hand it on as an array, and take the pointer of an argument.
    """
    if not _known(array) or isinstance(array, types.CPointer):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return cgutils.create_struct_proxy(array)(context, builder, value=args[0]).data

    return types.CPointer(array.dtype)(array), codegen


def _lanes_below(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """The <8 x i1> mask of the lanes i < count."""
    like = ir.VectorType(I32, LANES)
    one = builder.insert_element(ir.Constant(like, ir.Undefined), builder.trunc(count, I32), ir.Constant(I32, 0))
    all_lanes = builder.shuffle_vector(one, ir.Constant(like, ir.Undefined), mask(*[0] * LANES))
    return builder.icmp_signed("<", mask(*range(LANES)), all_lanes)


def _masked(builder: ir.IRBuilder, kind: str, element: ir.Type) -> tuple[ir.Function, ir.VectorType]:
    vector = ir.VectorType(element, LANES)
    bools = ir.VectorType(ir.IntType(1), LANES)
    suffix = "v8f32" if element == FLOAT else "v8i16"
    if kind == "load":
        form = ir.FunctionType(vector, [vector.as_pointer(), I32, bools, vector])
    else:
        form = ir.FunctionType(ir.VoidType(), [vector, vector.as_pointer(), I32, bools])
    return cgutils.get_or_insert_function(builder.module, form, f"llvm.masked.{kind}.{suffix}.p0"), vector


def emit_load(shape: Callable[[ir.Type], ir.Type], ret: types.Type) -> Callable[..., Any]:
    def typing(tyctx: Any, array: Any, offset: Any) -> Any:
        if not _known(array):
            return None

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            element = STORED[array.dtype]
            pointer = address(context, builder, array, args[0], args[1], shape(element))
            raw = builder.load(pointer, align=element.get_abi_size(context.target_data))
            return _widen(builder, array.dtype, raw)

        return ret(array, types.int64), codegen

    return typing


def _store(shape: Callable[[ir.Type], ir.Type], arg: types.Type) -> Callable[..., Any]:
    def typing(tyctx: Any, array: Any, offset: Any, value: Any) -> Any:
        if not _known(array):
            return None

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            element = STORED[array.dtype]
            pointer = address(context, builder, array, args[0], args[1], shape(element))
            raw = _narrow(builder, array.dtype, args[2])
            builder.store(raw, pointer, align=element.get_abi_size(context.target_data))
            return context.get_dummy_value()

        return types.none(array, types.int64, arg), codegen

    return typing


@intrinsic
def narrow(tyctx: Any, array: Any) -> Any:
    """Whether elements are 16 bits: a constant, so the branch not taken is not compiled."""
    if not _known(array):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return ir.Constant(ir.IntType(1), int(array.dtype != types.float32))

    return types.boolean(array), codegen


@intrinsic
def widest(tyctx: Any, array: Any, wide: Any) -> Any:
    """`array` where it is fp32, else `wide`: decided by type, so nothing is compiled for the other."""
    if not _known(array):
        return None
    kept = int(array.dtype != types.float32)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return args[kept]

    return (array, wide)[kept](array, wide), codegen


@intrinsic
def prefetch(tyctx: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line of an element, which may lie past the end, into the second-level cache."""
    if not _known(array):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        form = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0")
        line = address(context, builder, array, args[0], args[1], ir.IntType(8))
        builder.call(function, [line, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])
        return context.get_dummy_value()

    return types.none(array, types.int64), codegen


@intrinsic
def store_lanes(tyctx: Any, array: Any, offset: Any, value: Any, first: Any, count: Any) -> Any:
    """Lanes first … first + count − 1 (literals) to as many fp32 elements at `offset`."""
    if not isinstance(first, types.IntegerLiteral) or not isinstance(count, types.IntegerLiteral):
        return None
    start, some = first.literal_value, ir.VectorType(FLOAT, count.literal_value)
    lanes = ir.Constant(ir.VectorType(I32, some.count), list(range(start, start + some.count)))

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        piece = builder.shuffle_vector(args[2], ir.Constant(VECTOR, ir.Undefined), lanes)
        builder.store(piece, address(context, builder, array, args[0], args[1], some), align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, f32x8, first, count), codegen


@intrinsic
def load8(tyctx: Any, array: Any, offset: Any) -> Any:
    """Eight elements from `offset`, unaligned, as fp32."""
    return emit_load(lambda element: ir.VectorType(element, LANES), f32x8)(tyctx, array, offset)


@intrinsic
def load1(tyctx: Any, array: Any, offset: Any) -> Any:
    """One element as fp32."""
    return emit_load(lambda element: element, types.float32)(tyctx, array, offset)


@intrinsic
def store8(tyctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """Eight elements to `offset`, rounded to nearest even where the array is bf16 or fp16."""
    return _store(lambda element: ir.VectorType(element, LANES), f32x8)(tyctx, array, offset, value)


@intrinsic
def store1(tyctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """One fp32 value, rounded to nearest even where the array is bf16 or fp16."""
    return _store(lambda element: element, types.float32)(tyctx, array, offset, value)


@intrinsic
def load8n(tyctx: Any, array: Any, offset: Any, count: Any) -> Any:
    """The first `count` of eight elements; the other lanes are 0 and their memory is not touched."""
    if not _known(array):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        element = STORED[array.dtype]
        function, vector = _masked(builder, "load", element)
        pointer = address(context, builder, array, args[0], args[1], vector)
        align = ir.Constant(I32, element.get_abi_size(context.target_data))
        raw = builder.call(function, [pointer, align, _lanes_below(builder, args[2]), ir.Constant(vector, None)])
        return _widen(builder, array.dtype, raw)

    return f32x8(array, types.int64, types.int64), codegen


@intrinsic
def store8n(tyctx: Any, array: Any, offset: Any, value: Any, count: Any) -> Any:
    """The first `count` lanes to `offset`, rounded as by `store8`; the other elements are not touched."""
    if not _known(array):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        element = STORED[array.dtype]
        function, vector = _masked(builder, "store", element)
        pointer = address(context, builder, array, args[0], args[1], vector)
        align = ir.Constant(I32, element.get_abi_size(context.target_data))
        raw = _narrow(builder, array.dtype, args[2])
        builder.call(function, [raw, pointer, align, _lanes_below(builder, args[3])])
        return context.get_dummy_value()

    return types.none(array, types.int64, f32x8, types.int64), codegen
