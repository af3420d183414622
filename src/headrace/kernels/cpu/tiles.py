"""The tiles of a matrix product: sums of a few rows by a few outputs side by side, in registers.

    sums[r, n] = chain of x(r, k) · w(k, n) for k = 0 … count − 1, one fused multiply-add after another from +0

Vectors lie along the outputs n, so no sum crosses lanes: a lane is an output, and neither the shape of a tile nor the
width of the registers can change a bit. Without AVX-512 LLVM makes two instructions of 256 bits of one. Each tile is
an LLVM function that is never inlined, so that a module's callers share it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from headrace.kernels.cpu.launch import WIDE
from headrace.kernels.cpu.memory import STORED, emit_prefetch, widen
from headrace.kernels.cpu.simd import FLOAT, I32, emit_fma, emit_splat, intrinsic, mask
from headrace.kernels.panels import LANES

__all__ = ["LANES", "RESUME", "SIDE", "emit_turned", "score_tile", "tile", "turned_tile"]

SIDE = 16 if WIDE else 8
"""Lanes that are turned together, and words of 32 bits of each."""
LINE = 64
"""Bytes of a cache line."""
RESUME = -1
"""In place of a number of earlier sums, as a literal: the chain goes on from the sum that is there."""
FOLD = (0, 4, 2, 6, 1, 5, 3, 7)
"""The lanes of `hsum8` in the order in which a balanced tree adds them, neighbours first."""
I16, I64, BYTES, FLOATS = ir.IntType(16), ir.IntType(64), ir.IntType(8).as_pointer(), FLOAT.as_pointer()
SIZES = [types.int64] * 5


def _bytes(dtype: types.Type) -> int:
    return 4 if dtype == types.float32 else 2


def _vector(lanes: int) -> ir.VectorType:
    return ir.VectorType(FLOAT, lanes)


def _literals(*shape: Any) -> tuple[int, ...] | None:
    return tuple(x.literal_value for x in shape) if all(isinstance(x, types.IntegerLiteral) for x in shape) else None


def _sizes(*sizes: Any) -> list[types.Type]:
    """Return the types of arguments that are literals if all of these are."""
    return list(sizes) if _literals(*sizes) is not None else [types.int64] * len(sizes)


# ---- chains ----------------------------------------------------------------------------------------------------


class _Chains:
    """Accumulators of `rows` rows by some vectors, and the rows' elements of x."""

    def __init__(
        self,
        builder: ir.IRBuilder,
        rows: int,
        vectors: int,
        lanes: int,
        x: Sequence[ir.Value],
        fixed: tuple[int, ...] | None,
    ) -> None:
        """x: (pointer, row, step, valid); `fixed` are (row, step) where all rows are there at constant distances."""
        self.builder, self.lanes = builder, lanes
        self.sums = {(r, v): builder.alloca(_vector(lanes)) for r in range(rows) for v in range(vectors)}
        base, row, self.step, valid = x
        if fixed is not None:  # constants, for which no register is needed
            self.step, self.rows = I64(fixed[1]), [builder.gep(base, [I64(r * fixed[0])]) for r in range(rows)]
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

    def resume(self, to: ir.Value, pitch: ir.Value) -> None:
        """Go on from the sums at `to`."""
        for place, register in self._places(to, pitch):
            self.builder.store(self.builder.load(place, align=4), register)

    def finish(self, to: ir.Value, pitch: ir.Value, adds: ir.Value, slab: ir.Value) -> None:
        """Add the earlier sums, the furthest first, then store."""
        builder = self.builder
        with cgutils.for_range(builder, adds) as loop:
            back = builder.sub(builder.sub(adds, I64(1)), loop.index)
            for place, register in self._places(builder.gep(to, [builder.mul(back, slab)]), pitch):
                builder.store(builder.fadd(builder.load(place, align=4), builder.load(register)), register)
        self.store(to, pitch)

    def add_to(self, earlier: Sequence[ir.Value]) -> None:
        """Add these sums, which came first."""
        for value, register in zip(earlier, self.sums.values()):
            self.builder.store(self.builder.fadd(value, self.builder.load(register)), register)

    def store(self, to: ir.Value, pitch: ir.Value) -> None:
        for place, register in self._places(to, pitch):
            self.builder.store(self.builder.load(register), place, align=4)

    def _places(self, base: ir.Value, pitch: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Each register and where its sums lie."""
        builder = self.builder
        for (r, v), register in self.sums.items():
            at = builder.add(builder.mul(I64(r), pitch), I64(self.lanes * v))
            yield builder.bitcast(builder.gep(base, [at]), _vector(self.lanes).as_pointer()), register


def _function(module: ir.Module, what: tuple[Any, ...], pointers: Sequence[ir.Type]) -> tuple[ir.Function, bool]:
    """The function that is named by `what`, and whether its body is still to be written."""
    name = re.sub(r"\W+", "_", "_".join(map(str, ("headrace", *what))))
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
    apart: Any,
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
    Where `row` and `step` are literals, every row is there.
    w(k, n) is w[w0 + n // 16 · panel + k · apart + n % 16], in any stored dtype. Before it is stored at
    sums[to + r·pitch + n], an output is added to those that lie (adds − 1)·slab, …, slab and 0 further, in this order;
    where `adds` is RESUME, the chain goes on from the sum that is there.
    Meanwhile as many bytes as the vectors of one k have in `far` are prefetched at far[ask], `on` bytes further for
    each k.
    """
    shape, fixed, resumes = _literals(rows, vectors), _literals(row, step), _literals(adds) == (RESUME,)
    if shape is None:
        return None
    distances = _literals(panel), _literals(apart)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        x, x0, row, step, valid, w, w0, panel, apart, count, sums, to, pitch, adds, slab, far, ask, on = args[2:]
        dtype, far_dtype = sig.args[7].dtype, sig.args[17].dtype
        what = ("tile", f"{shape[0]}x{shape[1]}", dtype, far_dtype, fixed, *distances, resumes)
        function, new = _function(builder.module, what, (x.type, w.type, sums.type, BYTES))
        if new:
            ahead = shape[1] * LANES * _bytes(far_dtype)
            _panel_tile(function, shape, dtype, fixed, distances, resumes, ahead)
        far = builder.bitcast(builder.gep(far, [ask]), BYTES)
        x, w, sums = builder.gep(x, [x0]), builder.gep(w, [w0]), builder.gep(sums, [to])
        builder.call(function, [x, row, step, valid, w, panel, apart, count, sums, pitch, adds, slab, far, on])
        return context.get_dummy_value()

    i = types.int64
    x_form, w_form = (x, i, *_sizes(row, step), i), (w, i, *_sizes(panel), *_sizes(apart), i)
    return types.none(rows, vectors, *x_form, *w_form, sums, i, i, adds if resumes else i, i, far, i, i), codegen


def _panel_tile(
    function: ir.Function,
    shape: tuple[int, ...],
    dtype: Any,
    fixed: tuple[int, ...] | None,
    distances: tuple[tuple[int, ...] | None, ...],
    resumes: bool,
    ahead: int,
) -> None:
    """Body; `distances`: of panels and of terms, where they are literals. `ahead` bytes are prefetched for each k."""
    x, row, step, valid, w, panel, apart, count, sums, pitch, adds, slab, far, on = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    chains = _Chains(builder, shape[0], shape[1], LANES, (x, row, step, valid), fixed)
    if resumes:
        chains.resume(sums, pitch)
    else:
        chains.start()
    panel, apart = (x if known is None else I64(*known) for x, known in zip((panel, apart), distances))
    panels = [builder.gep(w, [builder.mul(I64(v), panel)]) for v in range(shape[1])]
    with cgutils.for_range(builder, count) as loop:
        for line in range(0, ahead, LINE):
            emit_prefetch(builder, builder.gep(far, [builder.add(builder.mul(loop.index, on), I64(line))]))
        at = builder.mul(loop.index, apart)
        chains.add(loop.index, [_column(builder, builder.gep(first, [at]), dtype) for first in panels])
    if resumes:
        chains.store(sums, pitch)
    else:
        chains.finish(sums, pitch, adds, slab)
    builder.ret_void()


def _column(builder: ir.IRBuilder, place: ir.Value, dtype: Any) -> ir.Value:
    """A vector of stored elements as fp32."""
    stored = ir.VectorType(STORED[dtype], LANES).as_pointer()
    return widen(builder, dtype, builder.load(builder.bitcast(place, stored), align=_bytes(dtype)))


@intrinsic
def score_tile(
    tyctx: Any,
    rows: Any,
    x: Any,
    x0: Any,
    step: Any,
    w: Any,
    w0: Any,
    count: Any,
    sums: Any,
    to: Any,
    pitch: Any,
    far: Any,
    ask: Any,
) -> Any:
    """sums[to + r·pitch + n] = `hsum8` of the eight-lane dot product of x(r, …) and w(…, n), for sixteen n.

    Lane i of `hsum8` is the chain of the terms i, i + 8, …: chain by chain, each for all rows (a literal) and n.
    x(r, k) is x[x0 + r + k·step] with the literal `step`, and w(k, n) is w[w0 + 16·k + n]. Meanwhile 16·count
    elements are prefetched at far[ask].
    """
    shape = _literals(rows, step)
    if shape is None:
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        x, x0, _, w, w0, count, sums, to, pitch, far, ask = args[1:]
        dtype, size, none = sig.args[4].dtype, _bytes(sig.args[10].dtype), I64(0)
        what = ("score_tile", *shape, dtype, size)
        function, new = _function(builder.module, what, (x.type, w.type, sums.type, BYTES))
        if new:
            _score_tile(function, *shape, dtype, size)
        x, w, sums = builder.gep(x, [x0]), builder.gep(w, [w0]), builder.gep(sums, [to])
        far = builder.bitcast(builder.gep(far, [ask]), BYTES)
        builder.call(function, [x, none, none, none, w, none, none, count, sums, pitch, none, none, far, none])
        return context.get_dummy_value()

    i = types.int64
    return types.none(rows, x, i, step, w, i, i, sums, i, i, far, i), codegen


def _score_tile(function: ir.Function, rows: int, step: int, dtype: Any, size: int) -> None:
    """Body: as many chains at once as it takes to hide an addition's latency; then the tree adds them up."""
    x, none, _, _, w, _, _, count, sums, pitch, _, _, far, _ = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    together, waiting = max(1, (8 if WIDE else 4) // rows), []
    whole, ahead = builder.and_(count, I64(-8)), LANES * size * together
    for start in range(0, 8, together):
        lanes = FOLD[start : start + together]
        side = [_Chains(builder, rows, 1, LANES, (x, none, none, none), (1, step)) for _ in lanes]

        def add(first: ir.Value, lane: int, chains: _Chains) -> None:
            k = builder.add(first, I64(lane))
            chains.add(k, [_column(builder, builder.gep(w, [builder.mul(k, I64(LANES))]), dtype)])

        for chains in side:
            chains.start()
        with cgutils.for_range_slice(builder, I64(0), whole, I64(8)) as (first, _):
            turn = builder.udiv(builder.add(builder.mul(whole, I64(start // together)), first), I64(8))
            for line in range(0, ahead, LINE):
                at = builder.add(builder.mul(turn, I64(ahead)), I64(line))
                emit_prefetch(builder, builder.gep(far, [at]))
            for lane, chains in zip(lanes, side):
                add(first, lane, chains)
        for lane, chains in zip(lanes, side):
            with builder.if_then(builder.icmp_signed("<", I64(lane), builder.sub(count, whole))):
                add(whole, lane, chains)
        for number, chains in enumerate(side, start):
            while number & 1:
                chains.add_to(waiting.pop())
                number >>= 1
            waiting.append([builder.load(register) for register in chains.sums.values()])
    chains.store(sums, pitch)
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
    shape, fixed = _literals(rows), _literals(row, step)
    if shape is None:
        return None

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        x, x0, row, step, valid, w, w0, lane, lanes, count, sums, to, pitch, adds, slab, ask = args[1:]
        dtype = sig.args[6].dtype
        function, new = _function(
            builder.module, ("turned_tile", *shape, dtype, fixed), (x.type, w.type, sums.type, BYTES)
        )
        if new:
            _turned_tile(function, shape[0], dtype, fixed)
        far = builder.bitcast(builder.gep(w, [ask]), BYTES)
        x, w, sums = builder.gep(x, [x0]), builder.gep(w, [w0]), builder.gep(sums, [to])
        builder.call(function, [x, row, step, valid, w, lane, lanes, count, sums, pitch, adds, slab, far, I64(0)])
        return context.get_dummy_value()

    i = types.int64
    return types.none(rows, x, i, *_sizes(row, step), i, w, i, i, i, i, sums, i, i, i, i, i), codegen


def _turned_tile(function: ir.Function, rows: int, dtype: Any, fixed: tuple[int, ...] | None) -> None:
    """Body: a square of SIDE lanes by as many words at a time, all terms of the first lanes before the next lanes."""
    x, row, step, valid, w, lane, lanes, count, sums, pitch, adds, slab, far, _ = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    chains = _Chains(builder, rows, 1, SIDE, (x, row, step, valid), fixed)
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
