"""Op sets that replace some operations of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.base import BaseOps
from headrace.kernels.layers import LayerForm, LayerWeights
from headrace.kernels.ops import Kernel, Layers
from headrace.kernels.panels import Weight
from headrace.kernels.shards import OutputShards
from headrace.kernels.training import TrainingOps

__all__ = ["DelegatingOps", "ServingOps"]


class DelegatingOps(BaseOps):
    """What a subclass does not define is `base`'s, name and device too."""

    def __init__(self, base: TrainingOps) -> None:
        self.base = base

    def __getattr__(self, name: str) -> Any:
        # Called only for what is missing here, which `base` itself is while an object is copied or unpickled.
        if name.startswith("_") or name == "base":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return getattr(self.base, name)


class ServingOps(DelegatingOps):
    """The op set of a model that is loaded to serve: its matrices are what `Ops.store` gives."""

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Weight:
        return self.base.store(rows, columns, dtype)

    def layers(self, form: LayerForm, weights: Sequence[LayerWeights]) -> Layers | None:
        return self.base.layers(form, weights)

    def column_kernel(self, weight_NK: Weight, bias_N: Tensor | None, outputs: OutputShards) -> Kernel:
        return self.base.column_kernel(weight_NK, bias_N, outputs)

    def row_kernel(self, weight_NK: Weight, bias_N: Tensor | None, bounds: tuple[int, ...]) -> Kernel:
        return self.base.row_kernel(weight_NK, bias_N, bounds)
