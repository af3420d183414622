"""`CpuOps`: the op set on the CPU. It checks shapes, makes outputs and hands numpy views to the kernels."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from itertools import pairwise

import llvmlite
import numba
import numpy as np
import torch
from torch import Tensor

from headrace.kernels.cpu import attention as paged
from headrace.kernels.cpu import backward, elementwise, launch, optimizer
from headrace.kernels.cpu import sample as sampling
from headrace.kernels.cpu.attention_backward import Heads, attention_backward
from headrace.kernels.cpu.linear import SHARDS, linear, linear_part
from headrace.kernels.cpu.linear_backward import COLUMNS, HEIGHT, ROWS, product, product_part
from headrace.kernels.cpu.warmup import Progress, warm_up
from headrace.kernels.ops import AttentionMeta, SampleParams, Span, dropout_bar, signed64

__all__ = ["CpuOps"]

# numpy knows neither bf16 nor (in Numba) fp16: kernels tell them apart by the integer type their bits are viewed as.
VIEWS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
NOTHING = np.empty(0, np.float32)
ALONE = 1 << 15
"""Elements below which an element-wise operation stays on the calling thread."""
ALONE_PRODUCT = 1 << 17
"""Multiplications below which a matrix product does."""
SOURCE = launch.source_key()
"""Of the kernels that this process has imported: their files may be edited while it runs."""


@functools.lru_cache(maxsize=1024)
def _bounds(bounds: tuple[int, ...], width: int) -> np.ndarray:
    shards = len(bounds) - 1
    rising = bounds[0] == 0 and bounds[-1] == width and all(a <= b for a, b in pairwise(bounds))
    if not rising or shards not in (1, 2, 4, 8, SHARDS):
        raise ValueError(f"bounds={bounds} must rise from 0 to {width} in 1, 2, 4, 8 or {SHARDS} shards")
    return np.asarray(bounds, np.int64)


@functools.lru_cache(maxsize=1024)
def _spans(spans: tuple[tuple[int, int, int, int], ...], outputs: int, rows: int) -> np.ndarray:
    shards = [span[0] for span in spans]
    there = all(
        count >= 0 and 0 <= column <= outputs - count and 0 <= row <= rows - count for _, column, row, count in spans
    )
    if not there or sorted(set(shards)) != list(range(len(set(shards)))) or shards != sorted(shards):
        raise ValueError(f"spans={spans} must be of shards in order, within {outputs} columns and {rows} rows")
    if len(set(shards)) not in (1, 2, 4, 8, SHARDS):
        raise ValueError(f"spans={spans} must be of 1, 2, 4, 8 or {SHARDS} shards")
    return np.asarray(spans, np.int64)


@functools.lru_cache(maxsize=64)
def _row_chunks(bounds: tuple[int, ...], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(first and last row of every chunk, where each row shard's chunks start) for sums over rows."""
    if bounds[0] != 0 or bounds[-1] != rows or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"bounds={bounds} must rise from 0 to {rows} rows")
    chunks: list[tuple[int, int]] = []
    shards = [0]
    for first, last in pairwise(bounds):
        chunks += [(row, min(row + backward.ROWS, last)) for row in range(first, last, backward.ROWS)]
        shards.append(len(chunks))
    return np.asarray(chunks, np.int64).reshape(-1, 2), np.asarray(shards, np.int64)


def _integers(values: Tensor, dtype: torch.dtype = torch.int64) -> np.ndarray:
    return (values if values.dtype == dtype else values.to(dtype)).contiguous().numpy()


def _dense(x: Tensor) -> np.ndarray:
    """numpy's view of a contiguous fp32 activation."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"an activation must be contiguous float32, not {x.dtype} with strides {x.stride()}")
    return x.detach().numpy()


def _flat(x: Tensor) -> np.ndarray:
    """numpy's view of a flat contiguous fp32 tensor."""
    if x.ndim != 1:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} is not flat")
    return _dense(x)


def _alike(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{name} is {tuple(x.shape)} and {other} {tuple(y.shape)}")


def _strided(x: Tensor) -> np.ndarray:
    """One element at the start of a fp32 view: kernels reach the others by offset, so its strides do not matter."""
    if x.dtype != torch.float32 or x.stride(-1) != 1:
        raise ValueError(f"a head view must be float32, contiguous in its last axis, not {x.dtype} {x.stride()}")
    return x.detach().as_strided((1,), (1,)).numpy()


class CpuOps:
    """`headrace.kernels.ops.Ops` in Numba. fp32 activations; fp32, bf16 or fp16 weights and cache.

    One thread at a time may call it (Numba's workqueue is not thread-safe), and processes that use it are started
    with "spawn". `threads` None or 0 means every CPU that Numba sees; it changes no bits.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None, alone: bool = False) -> None:
        """`alone`: the cores are this process's, so threads stay awake between kernels. The first ops decide."""
        launch.start_threads(alone)
        self.device = torch.device("cpu")
        self.threads = launch.thread_count(threads)
        self._views: dict[int, tuple[weakref.ref[Tensor], int, np.ndarray]] = {}

    def fingerprint(self) -> str:
        """Implementation, hash of the kernels' source, the CPU's vector features, Numba's and LLVM's versions."""
        return f"cpu/{SOURCE}/{launch.vector_features()}/numba-{numba.__version__}/llvmlite-{llvmlite.__version__}"

    def warm_up(
        self,
        weights: torch.dtype = torch.float32,
        cache: torch.dtype = torch.float32,
        progress: Progress | None = None,
        training: bool = False,
    ) -> None:
        """Compile, or load from disk, what a model with these dtypes needs; progress(done, total, name) as it goes.

        Without it each kernel is compiled at its first call, once per dtype and machine.
        """
        warm_up(self, weights, cache, progress, training)

    # ---- views and work ----------------------------------------------------------------------------------------

    def _stored(self, tensor: Tensor) -> np.ndarray:
        """numpy's view of a weight or cache, kept while the tensor lives: making one costs more than a small op."""
        key = id(tensor)
        known = self._views.get(key)
        if known is not None and known[0]() is tensor and known[1] == tensor.data_ptr():
            return known[2]
        if tensor.dtype not in VIEWS or not tensor.is_contiguous():
            raise ValueError(
                f"weights and cache must be contiguous float32, bfloat16 or float16, not {tensor.dtype} "
                f"with strides {tensor.stride()}"
            )
        view = tensor.detach().view(VIEWS[tensor.dtype]).numpy()
        self._views[key] = (weakref.ref(tensor, lambda _: self._views.pop(key, None)), tensor.data_ptr(), view)
        return view

    def _tasks(self, rows: int, elements: int) -> int:
        """Into how many ranges of rows the threads cut an element-wise operation."""
        if elements < ALONE or rows < 2 or self.threads == 1:
            return 1
        launch.set_threads(self.threads)
        return min(rows, self.threads)

    # ---- the model's operations --------------------------------------------------------------------------------

    def embedding(self, ids_T: Tensor, table_VD: Tensor) -> Tensor:
        ids = _integers(ids_T)
        vocab, width = table_VD.shape
        out_TD = torch.empty((ids.size, width))
        bad = elementwise.embedding(
            ids, self._stored(table_VD), vocab, width, out_TD.numpy(), self._tasks(ids.size, out_TD.numel())
        )
        if bad >= 0:
            raise IndexError(f"id {ids[bad]} is not one of the table's {vocab} rows")
        return out_TD

    def linear(
        self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, bounds: Sequence[int] | None = None
    ) -> Tensor:
        rows, inputs = x_TK.shape
        width, depth = weight_NK.shape
        if depth != inputs:
            raise ValueError(f"x has {inputs} inputs and the weight {depth}")
        cuts = _bounds((0, inputs) if bounds is None else tuple(bounds), inputs)
        bias = NOTHING if bias_N is None else self._stored(bias_N)
        y_TN = torch.empty((rows, width))
        operands = (_dense(x_TK), rows, inputs, self._stored(weight_NK), width, bias, cuts, y_TN.numpy())
        if self.threads == 1 or rows * inputs * width < ALONE_PRODUCT:
            linear_part(*operands, 0, 1)
        else:
            launch.set_threads(self.threads)
            linear(*operands, self.threads)
        return y_TN

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = _dense(x_TD)
        out_TD = torch.empty_like(x_TD)
        width = x.shape[-1]
        rows = x.size // width
        elementwise.rms_norm(
            x, rows, width, self._stored(weight_D), np.float32(eps), out_TD.numpy(), self._tasks(rows, x.size)
        )
        return out_TD

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = _dense(x_TD)
        if residual_TD.shape != x_TD.shape:
            raise ValueError(f"x is {tuple(x_TD.shape)} and the residual {tuple(residual_TD.shape)}")
        out_TD, sum_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        rows, width = x.shape
        elementwise.add_rms_norm(
            x,
            _dense(residual_TD),
            rows,
            width,
            self._stored(weight_D),
            np.float32(eps),
            out_TD.numpy(),
            sum_TD.numpy(),
            self._tasks(rows, x.size),
        )
        return out_TD, sum_TD

    def rotary(
        self, x_THd: Tensor, positions_T: Tensor, table_Pd: Tensor, weight_d: Tensor | None = None, eps: float = 0.0
    ) -> Tensor:
        rows, heads, dim = x_THd.shape
        out_THd = torch.empty((rows, heads, dim))
        positions = _integers(positions_T)
        weight = NOTHING if weight_d is None else self._stored(weight_d)
        bad = elementwise.rotary(
            _strided(x_THd),
            x_THd.stride(0),
            x_THd.stride(1),
            heads,
            dim,
            positions,
            self._stored(table_Pd),
            table_Pd.shape[0],
            weight,
            np.float32(eps),
            out_THd.numpy(),
            self._tasks(rows, out_THd.numel()),
        )
        if bad >= 0:
            raise IndexError(f"position {positions[bad]} is not one of the rotary table's {table_Pd.shape[0]}")
        return out_THd

    def silu_mul(self, gate_up_TI: Tensor) -> Tensor:
        rows, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
        out_TI = torch.empty((rows, width))
        elementwise.silu_mul(_dense(gate_up_TI), rows, width, out_TI.numpy(), self._tasks(rows, 4 * out_TI.numel()))
        return out_TI

    # ---- the cache ---------------------------------------------------------------------------------------------

    def store_kv_(self, k_TGd: Tensor, v_TGd: Tensor, blocks: Tensor, layer: int, slots_T: Tensor) -> None:
        slots = _integers(slots_T, torch.int32)
        if not 0 <= layer < blocks.shape[1] or k_TGd.shape[1:] != (blocks.shape[3], blocks.shape[5]):
            raise IndexError(f"layer {layer} of heads {tuple(k_TGd.shape[1:])} is not in a cache {tuple(blocks.shape)}")
        bad = elementwise.store_kv(
            _strided(k_TGd),
            k_TGd.stride(0),
            k_TGd.stride(1),
            _strided(v_TGd),
            v_TGd.stride(0),
            v_TGd.stride(1),
            self._stored(blocks),
            layer,
            slots,
            self._tasks(slots.size, 2 * k_TGd.numel()),
        )
        if bad >= 0:
            raise IndexError(f"slot {slots[bad]} is not in a cache of {blocks.shape[0]} blocks")

    def attention(
        self,
        q_THd: Tensor,
        blocks: Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        window: int = 0,
        lse_TH: Tensor | None = None,
    ) -> Tensor:
        out_THd = torch.empty(q_THd.shape)
        if lse_TH is not None:
            _alike("lse", lse_TH, "a head's row", out_THd[..., 0])
        launch.set_threads(self.threads)
        paged.attention(
            _dense(q_THd),
            self._stored(blocks),
            layer,
            meta.block_table_SM.numpy(),
            meta.query_start_S1.numpy(),
            meta.context_len_S.numpy(),
            out_THd.numpy(),
            NOTHING if lse_TH is None else _dense(lse_TH),
            scale,
            window,
        )
        return out_THd

    def copy_blocks_(self, source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        if source.dtype != target.dtype or source.shape[1:] != target.shape[1:]:
            raise ValueError(
                f"blocks {source.dtype} {tuple(source.shape)} do not fit {target.dtype} {tuple(target.shape)}"
            )
        ours, theirs = self._stored(source), self._stored(target)
        for i, j in pairs:
            if min(i, j) < 0:
                raise IndexError(f"blocks ({i}, {j}): a block's number is not negative")
            theirs[j] = ours[i]

    # ---- logits ------------------------------------------------------------------------------------------------

    def edit_logits_(self, logits_RV: Tensor, rows_E: Tensor, ids_E: Tensor, divide_E: Tensor, add_E: Tensor) -> None:
        bad = elementwise.edit_logits(
            _dense(logits_RV), _integers(rows_E), _integers(ids_E), _dense(divide_E), _dense(add_E)
        )
        if bad >= 0:
            raise IndexError(f"edit {bad} names row {rows_E[bad]}, token {ids_E[bad]} of {tuple(logits_RV.shape)}")

    def mask_logits_(self, logits_RV: Tensor, rows_E: Tensor, mask_EW: Tensor) -> None:
        bad = elementwise.mask_logits(_dense(logits_RV), _integers(rows_E), _integers(mask_EW, torch.int32))
        if bad >= 0:
            raise IndexError(f"mask {bad} names row {rows_E[bad]} of {tuple(logits_RV.shape)}")

    def logsumexp(self, logits_RV: Tensor, bounds: Sequence[int]) -> Tensor:
        return self._merge(self._parts(logits_RV, bounds))

    def _parts(self, logits_RV: Tensor, bounds: Sequence[int]) -> np.ndarray:
        cuts = _bounds(tuple(bounds), logits_RV.shape[1])
        parts_RS2 = np.empty((logits_RV.shape[0], cuts.size - 1, 2), np.float32)
        launch.set_threads(self.threads)
        sampling.logsumexp_parts(_dense(logits_RV), cuts, parts_RS2)
        return parts_RS2

    @staticmethod
    def _merge(parts_RS2: np.ndarray) -> Tensor:
        out_R = torch.empty(len(parts_RS2))
        sampling.merge_logsumexp(parts_RS2, out_R.numpy())
        return out_R

    def score(self, logits_RV: Tensor, lse_R: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        rows = logits_RV.shape[0]
        out_R, rank_R = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        launch.set_threads(self.threads)
        sampling.score(_dense(logits_RV), _dense(lse_R), _integers(targets_R), out_R.numpy(), rank_R.numpy())
        return out_R, rank_R

    def top_logprobs(self, logits_RV: Tensor, lse_R: Tensor, k: int) -> tuple[Tensor, Tensor]:
        shape = (logits_RV.shape[0], min(k, logits_RV.shape[1]))
        out_Rk, ids_Rk = torch.empty(shape), torch.empty(shape, dtype=torch.int32)
        launch.set_threads(self.threads)
        sampling.top_logprobs(_dense(logits_RV), _dense(lse_R), shape[1], out_Rk.numpy(), ids_Rk.numpy())
        return out_Rk, ids_Rk

    def sample(self, logits_RV: Tensor, params: SampleParams) -> Tensor:
        out_R = torch.empty(logits_RV.shape[0], dtype=torch.int64)
        launch.set_threads(self.threads)
        sampling.sample(
            _dense(logits_RV),
            params.temperature_R.numpy(),
            params.top_k_R.numpy(),
            params.top_p_R.numpy(),
            params.min_p_R.numpy(),
            params.seed_R.numpy(),
            params.choice_R.numpy(),
            params.position_R.numpy(),
            out_R.numpy(),
        )
        return out_R

    # ---- what training adds ------------------------------------------------------------------------------------

    def rms_norm_backward(
        self, g_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, bounds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        _alike("the gradient", g_TD, "x", x_TD)
        width = x_TD.shape[-1]
        chunks, shards = _row_chunks(tuple(bounds), x_TD.numel() // width)
        g_x_TD, g_weight_SD = torch.empty_like(x_TD), torch.empty(len(shards) - 1, width)
        backward.rms_norm_backward(
            _dense(g_TD).reshape(-1),
            _dense(x_TD).reshape(-1),
            width,
            self._stored(weight_D),
            np.float32(eps),
            chunks,
            shards,
            g_x_TD.numpy().reshape(-1),
            np.empty(len(chunks) * width, np.float32),
            g_weight_SD.numpy(),
            self._tasks(len(chunks), x_TD.numel()),
        )
        return g_x_TD, g_weight_SD

    def linear_backward_input(self, g_TN: Tensor, weight_NK: Tensor, spans: Sequence[Span]) -> Tensor:
        outputs, inputs = weight_NK.shape
        rows, columns = g_TN.shape
        g_x = torch.empty((rows, inputs))
        self._product(
            _dense(g_TN),
            rows,
            columns,
            1,
            self._stored(weight_NK),
            inputs,
            _spans(tuple(spans), columns, outputs),
            g_x,
            False,
        )
        return g_x

    def linear_backward_weight(self, g_TN: Tensor, x_TK: Tensor, into_NK: Tensor | None = None) -> Tensor:
        (rows, outputs), inputs = g_TN.shape, x_TK.shape[1]
        g_weight = torch.empty((outputs, inputs)) if into_NK is None else into_NK
        if len(x_TK) != rows or g_weight.shape != (outputs, inputs):
            raise ValueError(f"{tuple(g_TN.shape)} gradients of {tuple(x_TK.shape)} do not go {tuple(g_weight.shape)}")
        self._product(
            _dense(g_TN),
            outputs,
            1,
            outputs,
            _dense(x_TK),
            inputs,
            np.array([[0, 0, 0, rows]]),
            g_weight,
            into_NK is not None,
        )
        return g_weight

    def _product(
        self,
        a: np.ndarray,
        rows: int,
        row: int,
        step: int,
        b: np.ndarray,
        inputs: int,
        spans: np.ndarray,
        out: Tensor,
        adds: bool,
    ) -> None:
        """`product` in tasks of which every thread gets as many, where there are enough rows."""
        operands = (a, rows, row, step, b, inputs, spans, _dense(out), adds)
        across, tall = -(-inputs // COLUMNS), -(-rows // ROWS)
        if self.threads == 1 or out.numel() * int(spans[:, 3].sum()) < ALONE_PRODUCT:
            product_part(*operands, ROWS, np.zeros(1, np.int64))
            return
        while tall * across % self.threads and tall * HEIGHT < rows:
            tall += 1
        launch.set_threads(self.threads)
        product(*operands, -(-rows // (tall * HEIGHT)) * HEIGHT, self.threads)

    def attention_backward(
        self,
        g_THd: Tensor,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        out_THd: Tensor,
        lse_TH: Tensor,
        query_start_S1: Tensor,
        scale: float,
        window: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        for name, x, other, y in (
            ("g", g_THd, "q", q_THd),
            ("out", out_THd, "q", q_THd),
            ("k", k_TGd, "v", v_TGd),
            ("lse", lse_TH, "a head's row", q_THd[..., 0]),
        ):
            _alike(name, x, other, y)
        (_, heads, dim), kv_heads = q_THd.shape, k_TGd.shape[1]
        grads = torch.empty(q_THd.shape), torch.empty(k_TGd.shape), torch.empty(v_TGd.shape)
        k, v = (Heads(_strided(x), x.stride(0), x.stride(1)) for x in (k_TGd, v_TGd))
        launch.set_threads(self.threads)
        attention_backward(
            _dense(q_THd),
            k,
            v,
            _dense(g_THd),
            _dense(out_THd),
            _dense(lse_TH),
            _integers(query_start_S1, torch.int32),
            heads,
            kv_heads,
            dim,
            *(x.numpy() for x in grads),
            np.float32(scale),
            window,
            self.threads,
        )
        return grads

    def silu_mul_backward(self, g_TI: Tensor, gate_up_T2I: Tensor) -> Tensor:
        rows, width = g_TI.shape
        if gate_up_T2I.shape != (rows, 2 * width):
            raise ValueError(f"the gradient is {tuple(g_TI.shape)} and gate_up {tuple(gate_up_T2I.shape)}")
        g_gate_up_T2I = torch.empty_like(gate_up_T2I)
        backward.silu_mul_backward(
            _dense(g_TI), _dense(gate_up_T2I), rows, width, g_gate_up_T2I.numpy(), self._tasks(rows, 4 * g_TI.numel())
        )
        return g_gate_up_T2I

    def logsumexp_parts(self, logits_RV: Tensor, bounds: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._parts(logits_RV, bounds))

    def merge_logsumexp(self, parts_RS2: Tensor) -> Tensor:
        shards = parts_RS2.shape[1]
        if shards.bit_count() != 1:
            raise ValueError(f"{shards} shards: a balanced tree needs a power of two of them")
        return self._merge(_dense(parts_RS2).copy())

    def cross_entropy_backward_(self, logits_RV: Tensor, lse_R: Tensor, targets_R: Tensor, g_R: Tensor) -> None:
        rows, width = logits_RV.shape
        targets = _integers(targets_R)
        if not rows == lse_R.numel() == targets.size == g_R.numel():
            raise ValueError(
                f"{rows} rows of logits with {lse_R.numel()} sums, {targets.size} targets and {g_R.numel()} gradients"
            )
        bad = backward.cross_entropy_backward(
            _dense(logits_RV),
            rows,
            width,
            _dense(lse_R),
            targets,
            _dense(g_R),
            self._tasks(rows, 4 * logits_RV.numel()),
        )
        if bad >= 0:
            raise IndexError(f"target {targets[bad]} is not one of {width} tokens")

    def adamw_(
        self,
        master: Tensor,
        grad: Tensor,
        first: Tensor,
        second: Tensor,
        stored: Tensor | None,
        *,
        rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        step: int,
        scale: float,
    ) -> None:
        for name, tensor in (("grad", grad), ("first", first), ("second", second), ("stored", stored)):
            if tensor is not None:
                _alike("the master", master, name, tensor)
        factors = (
            scale,
            1 - beta1,
            beta2,
            1 - beta2,
            1 / math.sqrt(1 - beta2**step),
            eps,
            1 - rate * decay,
            -rate / (1 - beta1**step),
        )
        optimizer.adamw(
            _flat(master),
            self._stored(grad),
            _flat(first),
            _flat(second),
            NOTHING if stored is None else self._stored(stored),
            tuple(np.float32(factor) for factor in factors),
            self._tasks(master.numel(), master.numel()),
        )

    def sum_of_squares(self, flat: Tensor, chunk: int) -> Tensor:
        if flat.ndim != 1 or chunk < 1:
            raise ValueError(f"a tensor {tuple(flat.shape)} in chunks of {chunk}: it must be flat, and they at least 1")
        sums = torch.empty(-(-flat.numel() // chunk), dtype=torch.float64)
        optimizer.sum_of_squares(self._stored(flat), chunk, sums.numpy(), self._tasks(len(sums), flat.numel()))
        return sums

    def dropout(self, x_TD: Tensor, key: int, row_T: Tensor, first_feature: int, rate: float) -> Tensor:
        bar = dropout_bar(rate)
        if rate == 0:
            return x_TD
        if row_T.shape != x_TD.shape[:1] or x_TD.ndim != 2:
            raise ValueError(f"x is {tuple(x_TD.shape)} and its rows' numbers {tuple(row_T.shape)}")
        out_TD = torch.empty_like(x_TD)
        backward.dropout(
            _dense(x_TD),
            signed64(key),
            _integers(row_T),
            first_feature,
            bar,
            np.float32(1 / (1 - rate)),
            out_TD.numpy(),
            self._tasks(len(x_TD), 4 * x_TD.numel()),
        )
        return out_TD
