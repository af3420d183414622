"""Loading and storing eight fp32 lanes, or one element, from arrays of any of the stored dtypes.

Loads and stores take an array of any rank, or the `pointer` of one, and an offset **in elements from its data
pointer**, without bounds checks. Inside a hot function take pointers: an array is reference-counted, which costs
two atomic operations and a spill of every register around them. The dtype says how elements are read:

    float32   fp32            uint16   bfloat16            int16   float16
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from headrace.kernels.cpu.simd import FLOAT, I32, LANES, constant, f32x8, integers_like, intrinsic, mask

__all__ = [
    "beyond",
    "load1",
    "load8",
    "load8n",
    "narrow",
    "pointer",
    "pointer_at",
    "prefetch",
    "store1",
    "store8",
    "store8n",
]

I16 = ir.IntType(16)
STORED = {types.float32: FLOAT, types.uint16: I16, types.int16: I16}


def _halves(like: ir.Type) -> ir.Type:
    return ir.VectorType(ir.HalfType(), like.count) if isinstance(like, ir.VectorType) else ir.HalfType()


def _floats(like: ir.Type) -> ir.Type:
    return ir.VectorType(FLOAT, like.count) if isinstance(like, ir.VectorType) else FLOAT


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


def widen(builder: ir.IRBuilder, dtype: types.Type, raw: ir.Value) -> ir.Value:
    """fp32 of what was read: exact for all three formats."""
    if dtype == types.float32:
        return raw
    if dtype == types.int16:
        like = _halves(raw.type)
        return builder.fpext(builder.bitcast(raw, like), _floats(like))
    ints = integers_like(raw.type)
    wide = builder.shl(builder.zext(raw, ints), constant(ints, 16))
    return builder.bitcast(wide, _floats(ints))


def _narrow(builder: ir.IRBuilder, dtype: types.Type, value: ir.Value) -> ir.Value:
    """Round to nearest, ties to even, into the stored format. NaN stays NaN (torch's own bf16 NaN, 0x7fc0)."""
    if dtype == types.float32:
        return value
    if dtype == types.int16:
        half = builder.fptrunc(value, _halves(value.type))
        return builder.bitcast(half, integers_like(value.type, 16))
    ints = integers_like(value.type)
    bits = builder.bitcast(value, ints)
    odd = builder.and_(builder.lshr(bits, constant(ints, 16)), constant(ints, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(ints, 0x7FFF))), constant(ints, 16))
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), constant(ints, 0x7FC0), rounded)
    return builder.trunc(rounded, integers_like(value.type, 16))


def _known(array: Any) -> bool:
    return isinstance(array, (types.Array, types.CPointer)) and array.dtype in STORED


@intrinsic
def pointer(tyctx: Any, array: Any) -> Any:
    """The array's data pointer, which is not reference-counted: the caller keeps the array alive.

    A local array is freed after its last use: pass it on as an array, and take the pointer of an argument. A pointer
    is its own.
    """
    if not _known(array):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        if isinstance(array, types.CPointer):
            return args[0]
        return cgutils.create_struct_proxy(array)(context, builder, value=args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def beyond(tyctx: Any, start: Any, elements: Any) -> Any:
    """The pointer to so many elements after another one."""
    if not _known(start) or not isinstance(start, types.CPointer):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.gep(args[0], [args[1]])

    return start(start, types.int64), codegen


@intrinsic
def pointer_at(tyctx: Any, address: Any, like: Any) -> Any:
    """The pointer to an address, of elements such as those of the array or pointer `like`."""
    if not _known(like):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(like.dtype)))

    return types.CPointer(like.dtype)(types.int64, like), codegen


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
            return widen(builder, array.dtype, raw)

        return ret(array, types.int64), codegen

    return typing


def emit_prefetch(builder: ir.IRBuilder, line: ir.Value) -> None:
    """Into the second-level cache."""
    form = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0")
    builder.call(function, [line, I32(0), I32(2), I32(1)])


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
def prefetch(tyctx: Any, array: Any, offset: Any) -> Any:
    """Prefetch the cache line of an element, which may lie past the end, into the second-level cache."""
    if not _known(array):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        emit_prefetch(builder, address(context, builder, array, args[0], args[1], ir.IntType(8)))
        return context.get_dummy_value()

    return types.none(array, types.int64), codegen


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
        return widen(builder, array.dtype, raw)

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
