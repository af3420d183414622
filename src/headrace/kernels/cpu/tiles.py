"""The tiles of a matrix product: sums of a few rows by a few outputs side by side, in registers.

    sums[r, n] = chain of x(r, k) · w(k, n) for k = 0 … count − 1, one fused multiply-add after another from +0

Vectors lie along the outputs n, so no sum crosses lanes: a lane is an output, and neither the shape of a tile nor the
width of the registers can change a bit. Without AVX-512 LLVM makes two instructions of 256 bits of one. Each tile is
an LLVM function that is never inlined, so that a module's callers share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from headrace.kernels.cpu.launch import WIDE
from headrace.kernels.cpu.memory import STORED, emit_prefetch, widen
from headrace.kernels.cpu.simd import FLOAT, I32, emit_fma, emit_splat, intrinsic, mask
from headrace.kernels.panels import LANES

__all__ = ["LANES", "SIDE", "emit_turned", "tile", "turned_tile"]

SIDE = 16 if WIDE else 8
"""Lanes that are turned together, and words of 32 bits of each."""
LINE = 64
"""Bytes of a cache line."""
I16, I64, BYTES, FLOATS = ir.IntType(16), ir.IntType(64), ir.IntType(8).as_pointer(), FLOAT.as_pointer()
SIZES = [types.int64] * 5


def _bytes(dtype: types.Type) -> int:
    return 4 if dtype == types.float32 else 2


def _vector(lanes: int) -> ir.VectorType:
    return ir.VectorType(FLOAT, lanes)


def _literals(*shape: Any) -> tuple[int, ...] | None:
    return tuple(x.literal_value for x in shape) if all(isinstance(x, types.IntegerLiteral) for x in shape) else None


def _pitch(row: Any, step: Any) -> int | None:
    """Return the distance of two terms if x is packed (`row` is the literal 1, `step` a literal), else None."""
    literals = _literals(row, step)
    return literals[1] if literals is not None and literals[0] == 1 else None


# ---- chains ----------------------------------------------------------------------------------------------------


class _Chains:
    """Accumulators of `rows` rows by some vectors, and the rows' elements of x."""

    def __init__(
        self, builder: ir.IRBuilder, rows: int, vectors: int, lanes: int, x: Sequence[ir.Value], pitch: int | None
    ) -> None:
        """x: (pointer, row, step, valid); with a `pitch`, rows lie side by side and terms that far apart."""
        self.builder, self.lanes = builder, lanes
        self.sums = {(r, v): builder.alloca(_vector(lanes)) for r in range(rows) for v in range(vectors)}
        base, row, self.step, valid = x
        if pitch is not None:  # constants, for which no register is needed
            self.step, self.rows = I64(pitch), [builder.gep(base, [I64(r)]) for r in range(rows)]
            return
        last = builder.sub(valid, I64(1))
        firsts = [builder.select(builder.icmp_signed("<", I64(r), last), I64(r), last) for r in range(rows)]
        self.rows = [builder.gep(base, [builder.mul(first, row)]) for first in firsts]

    def start(self) -> None:
        for register in self.sums.values():
            self.builder.store(ir.Constant(_vector(self.lanes), [0.0] * self.lanes), register)

    def add(self, k: ir.Value, columns: Sequence[ir.Value]) -> None:
        """Multiply every row's element k by `columns`, the vectors of w(k, …), and add the products to the sums."""
        builder, at = self.builder, self.builder.mul(k, self.step)
        for r, row in enumerate(self.rows):
            value = emit_splat(builder, builder.load(builder.gep(row, [at])), self.lanes)
            for v, column in enumerate(columns):
                register = self.sums[r, v]
                builder.store(emit_fma(builder, value, column, builder.load(register)), register)

    def finish(self, to: ir.Value, pitch: ir.Value, adds: ir.Value, slab: ir.Value) -> None:
        """Add the earlier sums, the furthest first, then store."""
        builder = self.builder

        def place(base: ir.Value, r: int, v: int) -> ir.Value:
            at = builder.add(builder.mul(I64(r), pitch), I64(self.lanes * v))
            return builder.bitcast(builder.gep(base, [at]), _vector(self.lanes).as_pointer())

        with cgutils.for_range(builder, adds) as loop:
            back = builder.sub(builder.sub(adds, I64(1)), loop.index)
            base = builder.gep(to, [builder.mul(back, slab)])
            for (r, v), register in self.sums.items():
                earlier = builder.load(place(base, r, v), align=4)
                builder.store(builder.fadd(earlier, builder.load(register)), register)
        for (r, v), register in self.sums.items():
            builder.store(builder.load(register), place(to, r, v), align=4)


def _function(module: ir.Module, name: str, pointers: Sequence[ir.Type]) -> tuple[ir.Function, bool]:
    """The function of this name, and whether its body is still to be written."""
    known = module.globals.get(name)
    if known is not None:
        return known, False
    x, w, sums, far = pointers
    form = [x, *[I64] * 3, w, *[I64] * 3, sums, *[I64] * 3, far, I64]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), form), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    return function, True


# ---- panels ----------------------------------------------------------------------------------------------------


@intrinsic
def tile(
    tyctx: Any,
    rows: Any,
    vectors: Any,
    x: Any,
    x0: Any,
    row: Any,
    step: Any,
    valid: Any,
    w: Any,
    w0: Any,
    panel: Any,
    count: Any,
    sums: Any,
    to: Any,
    pitch: Any,
    adds: Any,
    slab: Any,
    far: Any,
    ask: Any,
    on: Any,
) -> Any:
    """Chains of `rows` rows by `vectors` vectors (literals), added to `adds` earlier sums.

    x(r, k) is x[x0 + r·row + k·step], fp32; of `valid` rows (1 or more) the last stands for those that are missing.
    Where `row` is the literal 1 and `step` one too, every row is there: the rows of packed terms.
    w(k, n) is w[w0 + n // 16 · panel + 16 · k + n % 16], in any stored dtype. Before it is stored at
    sums[to + r·pitch + n], an output is added to those that lie (adds − 1)·slab, …, slab and 0 further, in this order.
    Meanwhile as many bytes as the vectors of one k have in `far` are prefetched at far[ask], `on` bytes further for
    each k.
    """
    shape = _literals(rows, vectors)
    if shape is None:
        return None

    literal = _pitch(row, step)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        x, x0, row, step, valid, w, w0, panel, count, sums, to, pitch, adds, slab, far, ask, on = args[2:]
        dtype, far_dtype = sig.args[7].dtype, sig.args[16].dtype
        name = f"headrace_tile_{shape[0]}x{shape[1]}_{dtype}_{far_dtype}_{literal}"
        function, new = _function(builder.module, name, (x.type, w.type, sums.type, BYTES))
        if new:
            _panel_tile(function, shape[0], shape[1], dtype, literal, shape[1] * LANES * _bytes(far_dtype))
        far = builder.bitcast(builder.gep(far, [ask]), BYTES)
        row, step = (row, step) if literal is None else (I64(1), I64(literal))
        x, w, sums = builder.gep(x, [x0]), builder.gep(w, [w0]), builder.gep(sums, [to])
        builder.call(function, [x, row, step, valid, w, panel, I64(0), count, sums, pitch, adds, slab, far, on])
        return context.get_dummy_value()

    i = types.int64
    return types.none(
        rows, vectors, x, i, i, i if literal is None else step, i, w, i, i, i, sums, i, i, i, i, far, i, i
    ), codegen


def _panel_tile(function: ir.Function, rows: int, vectors: int, dtype: Any, literal: int | None, ahead: int) -> None:
    """Body; `ahead` bytes are prefetched for each k."""
    x, row, step, valid, w, panel, _, count, sums, pitch, adds, slab, far, on = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    chains = _Chains(builder, rows, vectors, LANES, (x, row, step, valid), literal)
    chains.start()
    stored = ir.VectorType(STORED[dtype], LANES).as_pointer()
    panels = [builder.gep(w, [builder.mul(I64(v), panel)]) for v in range(vectors)]
    with cgutils.for_range(builder, count) as loop:
        for line in range(0, ahead, LINE):
            emit_prefetch(builder, builder.gep(far, [builder.add(builder.mul(loop.index, on), I64(line))]))
        places = [builder.gep(first, [builder.mul(loop.index, I64(LANES))]) for first in panels]
        raw = [builder.load(builder.bitcast(place, stored), align=_bytes(dtype)) for place in places]
        chains.add(loop.index, [widen(builder, dtype, vector) for vector in raw])
    chains.finish(sums, pitch, adds, slab)
    builder.ret_void()


# ---- rows of a weight ------------------------------------------------------------------------------------------


@intrinsic
def turned_tile(
    tyctx: Any,
    rows: Any,
    x: Any,
    x0: Any,
    row: Any,
    step: Any,
    valid: Any,
    w: Any,
    w0: Any,
    lane: Any,
    lanes: Any,
    count: Any,
    sums: Any,
    to: Any,
    pitch: Any,
    adds: Any,
    slab: Any,
    ask: Any,
) -> Any:
    """`tile` of one vector whose terms are contiguous, w(k, n) = w[w0 + n·lane + k], turned in registers.

    Of `lanes` outputs (1 … 16) the last stands for those that are missing. As many bytes as it reads are prefetched at
    w[ask], in a row.
    """
    shape, literal = _literals(rows), _pitch(row, step)
    if shape is None:
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        x, x0, row, step, valid, w, w0, lane, lanes, count, sums, to, pitch, adds, slab, ask = args[1:]
        dtype = sig.args[6].dtype
        function, new = _function(
            builder.module, f"headrace_turned_tile_{shape[0]}_{dtype}_{literal}", (x.type, w.type, sums.type, BYTES)
        )
        if new:
            _turned_tile(function, shape[0], dtype, literal)
        far = builder.bitcast(builder.gep(w, [ask]), BYTES)
        row, step = (row, step) if literal is None else (I64(1), I64(literal))
        x, w, sums = builder.gep(x, [x0]), builder.gep(w, [w0]), builder.gep(sums, [to])
        builder.call(function, [x, row, step, valid, w, lane, lanes, count, sums, pitch, adds, slab, far, I64(0)])
        return context.get_dummy_value()

    i = types.int64
    return types.none(
        rows, x, i, *((i, i) if literal is None else (row, step)), i, w, i, i, i, i, sums, i, i, i, i, i
    ), codegen


def _turned_tile(function: ir.Function, rows: int, dtype: Any, literal: int | None) -> None:
    """Body: a square of SIDE lanes by as many words at a time, all terms of the first lanes before the next lanes."""
    x, row, step, valid, w, lane, lanes, count, sums, pitch, adds, slab, far, _ = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    chains = _Chains(builder, rows, 1, SIDE, (x, row, step, valid), literal)
    terms, last = SIDE * 4 // _bytes(dtype), builder.sub(lanes, I64(1))
    squares = builder.udiv(count, I64(terms))
    for first in range(0, LANES, SIDE):
        chains.start()
        starts = []
        for i in range(first, first + SIDE):
            index = builder.select(builder.icmp_signed("<", I64(i), last), I64(i), last)
            starts.append(builder.gep(w, [builder.mul(index, lane)]))
        with cgutils.for_range(builder, squares) as loop:
            k = builder.mul(loop.index, I64(terms))
            for line in range(0, SIDE * SIDE * 4, LINE):
                at = builder.add(builder.mul(loop.index, I64(SIDE * SIDE * 4)), I64(line))
                emit_prefetch(builder, builder.gep(far, [at]))
            for i, column in enumerate(emit_turned(builder, dtype, [builder.gep(start, [k]) for start in starts])):
                chains.add(builder.add(k, I64(i)), [column])
        with cgutils.for_range_slice(builder, builder.mul(squares, I64(terms)), count, I64(1)) as (k, _):
            column = ir.Constant(ir.VectorType(STORED[dtype], SIDE), ir.Undefined)
            for i, start in enumerate(starts):
                column = builder.insert_element(column, builder.load(builder.gep(start, [k])), I32(i))
            chains.add(k, [widen(builder, dtype, column)])
        chains.finish(builder.gep(sums, [I64(first)]), pitch, adds, slab)
        far = builder.gep(far, [builder.mul(squares, I64(SIDE * SIDE * 4))])
    builder.ret_void()


def _stage(distance: int) -> list[list[int]]:
    """What becomes of two vectors at this distance: the lanes of both that make the first, and the second."""
    sides, half = (0, SIDE), 2 if distance < 4 else distance
    runs = [range(start, start + half) for start in range(0, SIDE, 2 * half)]
    low, high = ([range(run[0] + skip, run[0] + skip + half) for run in runs] for skip in (0, half))
    if distance == 1:
        return [[i + side for run in part for i in run for side in sides] for part in (low, high)]
    return [[i + side for run in part for side in sides for i in run] for part in (low, high)]


def emit_turned(builder: ir.IRBuilder, dtype: Any, starts: Sequence[ir.Value]) -> list[ir.Value]:
    """Terms, as fp32 vectors of SIDE lanes, of the words that begin at `starts`; of 16-bit elements a word has two.

    The first two stages interleave within 128 bits, which is one instruction, and exchange the columns 1 and 2 of four.
    """
    words, halves = ir.VectorType(I32, SIDE), ir.VectorType(I16, SIDE)
    rows = [builder.load(builder.bitcast(start, words.as_pointer()), align=_bytes(dtype)) for start in starts]
    distance = 1
    while distance < SIDE:
        low, high = _stage(distance)
        for i in [i for i in range(SIDE) if not i & distance]:
            a, b = rows[i], rows[i + distance]
            rows[i] = builder.shuffle_vector(a, b, mask(*low))
            rows[i + distance] = builder.shuffle_vector(a, b, mask(*high))
        distance *= 2
    columns = [rows[i & ~3 | (0, 2, 1, 3)[i & 3]] for i in range(SIDE)]
    if STORED[dtype] == FLOAT:
        return [builder.bitcast(column, _vector(SIDE)) for column in columns]
    shift, terms = ir.Constant(words, [16] * SIDE), []
    for column in columns:
        for word in (column, builder.lshr(column, shift)):
            terms.append(widen(builder, dtype, builder.trunc(word, halves)))
    return terms
