"""`CpuServingOps`: what serving needs of the op set, on the CPU.

It checks shapes, makes outputs and hands numpy views to the kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import llvmlite
import numba
import numpy as np
import torch
from torch import Tensor

from headrace.kernels.base import BaseOps
from headrace.kernels.cpu import attention as paged
from headrace.kernels.cpu import elementwise, launch, pool
from headrace.kernels.cpu import sample as sampling
from headrace.kernels.cpu.product import LANES, product, product_alone
from headrace.kernels.cpu.program import CpuLayers
from headrace.kernels.cpu.tree import fold, most_nodes
from headrace.kernels.cpu.views import NOTHING, alike, bounds_array, bounds_chunks, dense, integers, strided, viewed
from headrace.kernels.layers import LayerForm, LayerWeights
from headrace.kernels.ops import AttentionMeta, SampleParams
from headrace.kernels.panels import Panels, Weight
from headrace.kernels.partials import Partials, owners_ranges, split_ranges

__all__ = ["ALONE_PRODUCT", "CpuServingOps"]

ALONE = 1 << 15
"""Elements below which an element-wise operation stays on the calling thread."""
ALONE_PRODUCT = 1 << 17
"""Multiplications below which a matrix product does."""
SOURCE = launch.source_key()
"""Of the kernels that this process has imported: their files may be edited while it runs."""


class CpuServingOps(BaseOps):
    """`headrace.kernels.ops.Ops` in Numba. fp32 activations; fp32, bf16 or fp16 weights and cache.

    One thread at a time may call it (Numba's workqueue is not thread-safe), and processes that use it are started
    with "spawn". `threads` None or 0 means every CPU that Numba sees; it changes no bits.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        self._one_call = pool.start_threads()
        self.device = torch.device("cpu")
        self.threads = launch.thread_count(threads)
        self._views: dict[int, tuple[weakref.ref[Tensor], int, np.ndarray]] = {}

    def fingerprint(self) -> str:
        """Implementation, hash of the kernels' source, the CPU's vector features, Numba's and LLVM's versions."""
        return f"cpu/{SOURCE}/{launch.vector_features()}/numba-{numba.__version__}/llvmlite-{llvmlite.__version__}"

    # ---- views and work ----------------------------------------------------------------------------------------

    def _matrix(self, weight: Weight) -> tuple[np.ndarray, int, int, int]:
        """A weight [N, K] as kernels take it: its elements, and the strides of a `packing.Matrix`."""
        width = weight.shape[1]
        if isinstance(weight, Panels):
            return self._stored(weight.tensor).reshape(-1), LANES, 1, LANES * width
        return self._stored(weight).reshape(-1), 1, width, LANES * width

    def _stored(self, tensor: Tensor) -> np.ndarray:
        """numpy's view of a weight or cache, kept while the tensor lives: making one costs more than a small op."""
        key = id(tensor)
        known = self._views.get(key)
        if known is not None and known[0]() is tensor and known[1] == tensor.data_ptr():
            return known[2]
        view = viewed(tensor)
        self._views[key] = (weakref.ref(tensor, lambda _: self._views.pop(key, None)), tensor.data_ptr(), view)
        return view

    def _tasks(self, rows: int, elements: int) -> int:
        """Into how many ranges of rows the threads cut an element-wise operation."""
        if elements < ALONE or rows < 2 or self.threads == 1:
            return 1
        launch.set_threads(self.threads)
        return min(rows, self.threads)

    # ---- the model's operations --------------------------------------------------------------------------------

    def store(self, rows: int, columns: int, dtype: torch.dtype) -> Panels:
        return Panels(rows, columns, dtype, self.device)

    def embedding(self, ids_T: Tensor, table_VD: Weight) -> Tensor:
        ids = integers(ids_T)
        vocab, width = table_VD.shape
        out_TD = torch.empty((ids.size, width))
        bad = elementwise.embedding(
            ids, *self._matrix(table_VD), vocab, width, out_TD.numpy(), self._tasks(ids.size, out_TD.numel())
        )
        if bad >= 0:
            raise IndexError(f"id {ids[bad]} is not one of the table's {vocab} rows")
        return out_TD

    def linear(
        self,
        x_TK: Tensor,
        weight_NK: Weight,
        bias_N: Tensor | None = None,
        bounds: Sequence[int] | None = None,
    ) -> Tensor:
        rows, inputs = x_TK.shape
        width, depth = weight_NK.shape
        if depth != inputs:
            raise ValueError(f"x has {inputs} inputs and the weight {depth}")
        chunks = bounds_chunks((0, inputs) if bounds is None else tuple(bounds), inputs)
        bias = NOTHING if bias_N is None else self._stored(bias_N)
        y_TN = torch.empty((rows, width))
        self._multiply((dense(x_TK).reshape(-1), 1, inputs), self._matrix(weight_NK), bias, y_TN, False, chunks)
        return y_TN

    def _multiply(
        self,
        left: tuple[np.ndarray, int, int],
        right: tuple[np.ndarray, int, int, int],
        bias: np.ndarray,
        y: Tensor,
        adds: bool,
        chunks: tuple[np.ndarray, int],
    ) -> None:
        """`product`, by one thread where it is too small for several."""
        rows, outputs = y.shape
        operands = (*left, *right, bias, dense(y).reshape(-1), rows, outputs, adds, *chunks)
        if self.threads == 1 or left[0].size * outputs < ALONE_PRODUCT:
            product_alone(*operands)
        else:
            launch.set_threads(self.threads)
            product(*operands, self.threads)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = dense(x_TD)
        out_TD = torch.empty_like(x_TD)
        width = x.shape[-1]
        rows = x.size // width
        elementwise.rms_norm(
            x, rows, width, self._stored(weight_D), np.float32(eps), out_TD.numpy(), self._tasks(rows, x.size)
        )
        return out_TD

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = dense(x_TD)
        if residual_TD.shape != x_TD.shape:
            raise ValueError(f"x is {tuple(x_TD.shape)} and the residual {tuple(residual_TD.shape)}")
        out_TD, sum_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        rows, width = x.shape
        elementwise.add_rms_norm(
            x,
            dense(residual_TD),
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
        positions = integers(positions_T)
        weight = NOTHING if weight_d is None else self._stored(weight_d)
        bad = elementwise.rotary(
            strided(x_THd),
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
        elementwise.silu_mul(dense(gate_up_TI), rows, width, out_TI.numpy(), self._tasks(rows, 4 * out_TI.numel()))
        return out_TI

    def layers(self, form: LayerForm, weights: Sequence[LayerWeights]) -> CpuLayers | None:
        return CpuLayers(form, weights, self.threads) if self._one_call else None

    # ---- the cache ---------------------------------------------------------------------------------------------

    def store_kv_(self, k_TGd: Tensor, v_TGd: Tensor, blocks: Tensor, layer: int, slots_T: Tensor) -> None:
        slots = integers(slots_T, torch.int32)
        if not 0 <= layer < blocks.shape[1] or k_TGd.shape[1:] != (blocks.shape[3], blocks.shape[5]):
            raise IndexError(f"layer {layer} of heads {tuple(k_TGd.shape[1:])} is not in a cache {tuple(blocks.shape)}")
        bad = elementwise.store_kv(
            strided(k_TGd),
            k_TGd.stride(0),
            k_TGd.stride(1),
            strided(v_TGd),
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
        result = paged.Result(out_THd.numpy().reshape(-1), self._lse(lse_TH, q_THd), NOTHING, 0)
        self._attention(q_THd, blocks, layer, meta, paged.WHOLE, result, scale, window)
        return out_THd

    def attention_partials(
        self,
        q_THd: Tensor,
        blocks: Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        range_S2: Tensor,
        window: int = 0,
    ) -> Partials:
        splits_S2 = split_ranges(range_S2, meta.context_len_S)
        nodes = most_nodes(meta.query_start_S1.numpy(), meta.context_len_S.numpy(), splits_S2, window)
        parts = Partials.empty(q_THd, nodes)
        if nodes:
            ma, m, e = (x.numpy().reshape(-1) for x in parts)
            result = paged.Result(ma, m, e, nodes)
            self._attention(q_THd, blocks, layer, meta, splits_S2, result, scale, window)
        return parts

    def _attention(
        self,
        q_THd: Tensor,
        blocks: Tensor,
        layer: int,
        meta: AttentionMeta,
        splits_S2: np.ndarray,
        result: paged.Result,
        scale: float,
        window: int,
    ) -> None:
        launch.set_threads(self.threads)
        paged.attention(
            dense(q_THd),
            self._stored(blocks),
            layer,
            meta.block_table_SM.numpy(),
            meta.query_start_S1.numpy(),
            meta.context_len_S.numpy(),
            splits_S2,
            result,
            scale,
            window,
        )

    def fold_partials(
        self,
        parts: Sequence[Partials],
        ranges: Sequence[Tensor],
        meta: AttentionMeta,
        window: int = 0,
        lse_TH: Tensor | None = None,
    ) -> Tensor:
        splits_OS2 = owners_ranges(ranges, meta.context_len_S, meta.query_start_S1, window)
        ma, m, e = (torch.cat(tensors, 2) for tensors in zip(*parts))
        tokens, heads, pitch, dim = ma.shape
        out_THd = torch.empty(tokens, heads, dim)
        offsets = np.cumsum([0, *(part.m_THL.shape[2] for part in parts[:-1])])
        launch.set_threads(self.threads)
        fold(
            *(dense(x).reshape(-1) for x in (ma, m, e)),
            pitch,
            meta.query_start_S1.numpy(),
            meta.context_len_S.numpy(),
            splits_OS2,
            offsets,
            heads,
            dim,
            out_THd.numpy().reshape(-1),
            self._lse(lse_TH, out_THd),
            window,
        )
        return out_THd

    @staticmethod
    def _lse(lse_TH: Tensor | None, q_THd: Tensor) -> np.ndarray:
        if lse_TH is None:
            return NOTHING
        alike("lse", lse_TH, "a head's row", q_THd[..., 0])
        return dense(lse_TH).reshape(-1)

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
            dense(logits_RV), integers(rows_E), integers(ids_E), dense(divide_E), dense(add_E)
        )
        if bad >= 0:
            raise IndexError(f"edit {bad} names row {rows_E[bad]}, token {ids_E[bad]} of {tuple(logits_RV.shape)}")

    def mask_logits_(self, logits_RV: Tensor, rows_E: Tensor, mask_EW: Tensor) -> None:
        bad = elementwise.mask_logits(dense(logits_RV), integers(rows_E), integers(mask_EW, torch.int32))
        if bad >= 0:
            raise IndexError(f"mask {bad} names row {rows_E[bad]} of {tuple(logits_RV.shape)}")

    def logsumexp_parts(self, logits_RV: Tensor, bounds: Sequence[int]) -> Tensor:
        cuts = bounds_array(tuple(bounds), logits_RV.shape[1])
        parts_RS2 = torch.empty(logits_RV.shape[0], cuts.size - 1, 2)
        launch.set_threads(self.threads)
        sampling.logsumexp_parts(dense(logits_RV), cuts, parts_RS2.numpy())
        return parts_RS2

    def merge_logsumexp(self, parts_RS2: Tensor) -> Tensor:
        rows, shards, _ = parts_RS2.shape
        if shards.bit_count() != 1:
            raise ValueError(f"{shards} shards: a balanced tree needs a power of two of them")
        out_R = torch.empty(rows)
        sampling.merge_logsumexp(dense(parts_RS2).copy(), out_R.numpy())
        return out_R

    def score(self, logits_RV: Tensor, lse_R: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        rows = logits_RV.shape[0]
        out_R, rank_R = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        launch.set_threads(self.threads)
        sampling.score(dense(logits_RV), dense(lse_R), integers(targets_R), out_R.numpy(), rank_R.numpy())
        return out_R, rank_R

    def top_logprobs(self, logits_RV: Tensor, lse_R: Tensor, k: int) -> tuple[Tensor, Tensor]:
        shape = (logits_RV.shape[0], min(k, logits_RV.shape[1]))
        out_Rk, ids_Rk = torch.empty(shape), torch.empty(shape, dtype=torch.int32)
        launch.set_threads(self.threads)
        sampling.top_logprobs(dense(logits_RV), dense(lse_R), shape[1], out_Rk.numpy(), ids_Rk.numpy())
        return out_Rk, ids_Rk

    def sample(self, logits_RV: Tensor, params: SampleParams) -> Tensor:
        out_R = torch.empty(logits_RV.shape[0], dtype=torch.int64)
        launch.set_threads(self.threads)
        sampling.sample(
            dense(logits_RV),
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
