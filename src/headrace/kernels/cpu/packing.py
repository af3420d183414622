"""Copying a matrix's operands into the order in which tiles read them, in fp32."""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import load1, load8n, narrow, store1, store8
from headrace.kernels.cpu.simd import FLOAT, intrinsic
from headrace.kernels.cpu.simd16 import load16, store16
from headrace.kernels.cpu.tiles import SIDE, emit_turned

__all__ = ["Matrix", "pack"]


class Matrix(NamedTuple):
    """An operand by its strides, in elements: term s of lane i is at[s·term + i // group · block + i % group · lane].

    A lane is a row of a product's left operand and an output of its right one. Either `term` or `lane` is 1.
    """

    at: Any
    term: int
    lane: int
    block: int


@kernel
def pack(matrix, start, lanes, count, room, to, pitch):
    """room[to + k·pitch + i] = `count` terms of the first `lanes` (≤ pitch ≤ 16) lanes at matrix.at[start].

    What stands for lanes that are missing has no meaning. Up to two elements past the end may be written.
    """
    if matrix.lane == 1:
        _copy(matrix.at, start, matrix.term, lanes, count, room, to, pitch)
    else:
        _turn(matrix.at, start, matrix.lane, lanes, count, room, to, pitch)


@kernel
def _copy(source, start, term, lanes, count, room, to, pitch):
    for _ in range(count):
        if lanes == 16:
            store16(room, to, load16(source, start))
        else:
            store8(room, to, load8n(source, start, min(8, lanes)))
            if pitch > 8:
                store8(room, to + 8, load8n(source, start + 8, max(0, lanes - 8)))
        start += term
        to += pitch


@kernel
def _turn(source, start, lane, lanes, count, room, to, pitch):
    """Terms are contiguous: a square of them at a time."""
    step = SIDE * (2 if narrow(source) else 1)
    whole = count // step * step
    for k in range(0, whole, step):
        for i in range(0, pitch, SIDE):
            turn(source, start + k, lane, i, lanes, room, to + k * pitch + i, pitch)
    for k in range(whole, count):
        for i in range(pitch):
            store1(room, to + k * pitch + i, load1(source, start + k + min(i, lanes - 1) * lane))


@intrinsic
def turn(tyctx: Any, source: Any, at: Any, lane: Any, first: Any, lanes: Any, room: Any, to: Any, pitch: Any) -> Any:
    """A square of lanes first … first + SIDE − 1, words contiguous from source[at], to room[to + term·pitch + lane].

    The last of `lanes` stands for those that are missing. Of 16-bit elements a word has two. Terms are written in
    order: the next overwrites what is beyond `pitch`.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source, at, lane, first, lanes, room, to, pitch = args
        dtype, starts = sig.args[0].dtype, []
        last = builder.sub(lanes, lanes.type(1))
        for r in range(SIDE):
            index = builder.add(first, first.type(r))
            index = builder.select(builder.icmp_signed("<", index, last), index, last)
            starts.append(builder.gep(source, [builder.add(at, builder.mul(index, lane))]))
        terms, floats = emit_turned(builder, dtype, starts), ir.VectorType(FLOAT, SIDE)
        for k, term in enumerate(terms):
            place = builder.gep(room, [builder.add(to, builder.mul(to.type(k), pitch))])
            builder.store(term, builder.bitcast(place, floats.as_pointer()), align=4)
        return context.get_dummy_value()

    size = types.int64
    return types.none(source, size, size, size, size, room, size, size), codegen
