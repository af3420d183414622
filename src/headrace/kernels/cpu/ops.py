"""`CpuOps`: the whole op set on the CPU, what training needs of it on top of what serving does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.cpu import backward, launch, optimizer
from headrace.kernels.cpu.attention_backward import Heads, attention_backward
from headrace.kernels.cpu.product import LANES
from headrace.kernels.cpu.serving import CpuServingOps
from headrace.kernels.cpu.views import (
    NOTHING,
    alike,
    bounds_chunks,
    dense,
    flat,
    integers,
    row_chunks,
    spans_chunks,
    strided,
)
from headrace.kernels.cpu.warmup import warm_up
from headrace.kernels.dropout import dropout_bar, signed64
from headrace.kernels.shards import Span

__all__ = ["CpuOps"]


class CpuOps(CpuServingOps):
    """`headrace.kernels.training.TrainingOps` in Numba."""

    def warm_up(
        self,
        weights: torch.dtype = torch.float32,
        cache: torch.dtype = torch.float32,
        progress: Callable[[int, int, str], None] | None = None,
        training: bool = False,
        one_call: bool = False,
    ) -> None:
        """Compile, or load from disk, what a model with these dtypes needs; progress(done, total, name) as it goes.

        Without it each kernel is compiled at its first call, once per dtype and machine.
        """
        warm_up(self, weights, cache, progress, training, one_call)

    def rms_norm_backward(
        self, g_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, bounds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        alike("the gradient", g_TD, "x", x_TD)
        width = x_TD.shape[-1]
        chunks, shards = row_chunks(tuple(bounds), x_TD.numel() // width)
        g_x_TD, g_weight_SD = torch.empty_like(x_TD), torch.empty(len(shards) - 1, width)
        backward.rms_norm_backward(
            dense(g_TD).reshape(-1),
            dense(x_TD).reshape(-1),
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
        chunks = spans_chunks(tuple(spans), columns, outputs)
        left, right = dense(g_TN).reshape(-1), self._stored(weight_NK).reshape(-1)
        self._multiply((left, 1, columns), (right, inputs, 1, LANES), NOTHING, g_x, False, chunks)
        return g_x

    def linear_backward_weight(self, g_TN: Tensor, x_TK: Tensor, into_NK: Tensor | None = None) -> Tensor:
        (rows, outputs), inputs = g_TN.shape, x_TK.shape[1]
        g_weight = torch.empty((outputs, inputs)) if into_NK is None else into_NK
        if len(x_TK) != rows or g_weight.shape != (outputs, inputs):
            raise ValueError(f"{tuple(g_TN.shape)} gradients of {tuple(x_TK.shape)} do not go {tuple(g_weight.shape)}")
        adds, chunks = into_NK is not None, bounds_chunks((0, rows), rows)
        left, right = dense(g_TN).reshape(-1), dense(x_TK).reshape(-1)
        self._multiply((left, outputs, 1), (right, inputs, 1, LANES), NOTHING, g_weight, adds, chunks)
        return g_weight

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
            alike(name, x, other, y)
        (_, heads, dim), kv_heads = q_THd.shape, k_TGd.shape[1]
        grads = torch.empty(q_THd.shape), torch.empty(k_TGd.shape), torch.empty(v_TGd.shape)
        k, v = (Heads(strided(x), x.stride(0), x.stride(1)) for x in (k_TGd, v_TGd))
        launch.set_threads(self.threads)
        attention_backward(
            dense(q_THd),
            k,
            v,
            dense(g_THd),
            dense(out_THd),
            dense(lse_TH),
            integers(query_start_S1, torch.int32),
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
            dense(g_TI), dense(gate_up_T2I), rows, width, g_gate_up_T2I.numpy(), self._tasks(rows, 4 * g_TI.numel())
        )
        return g_gate_up_T2I

    def cross_entropy_backward_(self, logits_RV: Tensor, lse_R: Tensor, targets_R: Tensor, g_R: Tensor) -> None:
        rows, width = logits_RV.shape
        targets = integers(targets_R)
        if not rows == lse_R.numel() == targets.size == g_R.numel():
            raise ValueError(
                f"{rows} rows of logits with {lse_R.numel()} sums, {targets.size} targets and {g_R.numel()} gradients"
            )
        bad = backward.cross_entropy_backward(
            dense(logits_RV),
            rows,
            width,
            dense(lse_R),
            targets,
            dense(g_R),
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
                alike("the master", master, name, tensor)
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
            flat(master),
            self._stored(grad),
            flat(first),
            flat(second),
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
            dense(x_TD),
            signed64(key),
            integers(row_T),
            first_feature,
            bar,
            np.float32(1 / (1 - rate)),
            out_TD.numpy(),
            self._tasks(len(x_TD), 4 * x_TD.numel()),
        )
        return out_TD
