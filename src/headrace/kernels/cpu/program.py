"""`CpuLayers`: a model's blocks as one compiled call, or with ranks as one for each half block; see `layers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.cpu import launch
from headrace.kernels.cpu.layers import FIELDS, WINDOW, Chunks, PagedRows, Shape, buffers, counters, run_layers
from headrace.kernels.cpu.views import bounds_chunks, dense, integers, viewed
from headrace.kernels.layers import LayerForm, LayerWeights
from headrace.kernels.ops import AttentionMeta
from headrace.kernels.panels import Panels, Weight

__all__ = ["CpuLayers"]


class CpuLayers:
    """A `Layers`. It owns the memory of activations, which grows to the largest step and is used again."""

    def __init__(self, form: LayerForm, weights: Sequence[LayerWeights], threads: int) -> None:
        self.form, self.weights, self.threads = form, weights, threads
        self._panels = isinstance(weights[0].qkv, Panels)
        self._chunks = Chunks(
            *bounds_chunks((0, form.width), form.width),
            *bounds_chunks(form.out_bounds, form.heads * form.dim),
            *bounds_chunks(form.down_bounds, form.inner),
        )
        self._rope = dense(form.rope_Pd).reshape(-1)
        self._room = torch.empty(0)
        self._windows = np.zeros((len(weights), FIELDS), np.int64)
        self._windows[:, WINDOW] = [layer.window for layer in weights]
        # A layer's weights stand in the order of a row of the table.
        own = [getattr(layer, field.name) for layer in weights for field in fields(layer)[:FIELDS]]
        places = [at for at, weight in enumerate(own) if at % FIELDS != WINDOW and weight is not None]
        self._places, self._owners = np.array(places), [own[at] for at in places]
        halves = 2 * len(weights)
        alone = weights[0].over_ranks is None
        self._spans = [(0, halves)] if alone else [(half, half + 1) for half in range(halves)]
        """The halves of blocks that are computed between two exchanges."""

    def __call__(
        self, x_TD: Tensor, positions_T: Tensor, blocks: Tensor, meta: AttentionMeta, scale: float
    ) -> tuple[Tensor, Tensor]:
        form, rows = self.form, len(x_TD)
        cache, positions, slots = viewed(blocks), integers(positions_T), integers(meta.slots_T, torch.int32)
        self._check(rows, positions, slots, cache)
        shape = Shape(
            form.width,
            form.heads,
            form.kv_heads,
            form.dim,
            form.inner,
            np.float32(form.eps),
            np.float32(scale),
            self._panels,
        )
        table, at = self._table(), buffers(rows, shape).tolist()
        if self._room.numel() < at[-1]:
            self._room = torch.empty(at[-1])
        x, residual = (self._room[start : start + rows * form.width].view(rows, form.width) for start in at[:2])
        residual.numpy()[:] = dense(x_TD)
        launch.set_threads(self.threads)
        step = (
            self._room.numpy(),
            _stored(self.weights[0].qkv).reshape(-1),
            rows,
            shape,
            self._chunks,
            PagedRows(
                positions,
                slots,
                self._rope,
                cache.reshape(-1),
                meta.block_table_SM.numpy(),
                meta.query_start_S1.numpy(),
                meta.context_len_S.numpy(),
            ),
            cache.shape,
        )
        for first, last in self._spans:
            run_layers(table, first, last, *step, self._counters(last - first), self.threads)
            over_ranks = self.weights[first // 2].over_ranks
            if over_ranks is not None:
                x.numpy()[:] = dense(over_ranks[first % 2](x))
        return x, residual

    def _check(self, rows: int, positions: np.ndarray, slots: np.ndarray, cache: np.ndarray) -> None:
        """What the single operations check. In the call nothing may fail: other threads would wait for ever."""
        if len(positions) != rows or len(slots) != rows:
            raise ValueError(f"{rows} rows with {len(positions)} positions and {len(slots)} slots")
        if rows and not 0 <= positions.min() <= positions.max() < len(self.form.rope_Pd):
            raise IndexError(f"a position is not one of the rotary table's {len(self.form.rope_Pd)}")
        if rows and slots.max() >= cache.shape[0] * cache.shape[4]:
            raise IndexError(f"slot {slots.max()} is not in a cache of {cache.shape[0]} blocks")
        if cache.shape[1] != len(self.weights) or cache.shape[3::2] != (self.form.kv_heads, self.form.dim):
            raise IndexError(f"{len(self.weights)} layers of {self.form.kv_heads} heads are not in {cache.shape}")

    def _counters(self, halves: int) -> np.ndarray:
        """Tickets and done tasks of every stage: none yet."""
        return np.zeros(counters(halves), np.int64)

    def _table(self) -> np.ndarray:
        """The addresses, read anew for each call, so none can be stale. It takes 0.3 µs for each."""
        table = self._windows.copy()
        table.reshape(-1)[self._places] = [weight.data_ptr() for weight in self._owners]
        return table


def _stored(weight: Weight) -> np.ndarray:
    return viewed(weight.tensor if isinstance(weight, Panels) else weight)
