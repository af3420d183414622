"""`Panels`: a weight in the order in which tiles of sixteen outputs read it, for models that are loaded to serve."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LANES", "Panels", "Weight", "rows_of"]

LANES = 16
"""Outputs of a panel."""


class Panels:
    """A weight [N, K] as [⌈N / 16⌉, K, 16]: row r is lane r % 16 of panel r // 16. It has no gradient.

    A product's bits are those of the same weight as rows. Lanes past N hold zeros, and nothing reads them.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (rows, columns)
        self.tensor = torch.zeros(-(-rows // LANES), columns, LANES, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored elements."""
        return self.tensor.dtype

    def data_ptr(self) -> int:
        """Where the panels begin, as a tensor's."""
        return self.tensor.data_ptr()

    def put(self, first: int, rows_NK: Tensor) -> None:
        """Store rows `first`, first + 1, …, rounded to the weight's dtype. Raises `IndexError` if they do not fit."""
        count, last = len(rows_NK), first + len(rows_NK)
        if rows_NK.shape[1:] != self.shape[1:] or not 0 <= first <= last <= self.shape[0]:
            raise IndexError(f"rows {tuple(rows_NK.shape)} at {first} do not fit a weight {self.shape}")
        head = min(-first % LANES, count)
        whole = (count - head) // LANES * LANES
        self._lanes(first, rows_NK[:head])
        if whole:
            panels_PKl = rows_NK[head : head + whole].unflatten(0, (-1, LANES)).transpose(1, 2)
            self.tensor[(first + head) // LANES : (first + head + whole) // LANES].copy_(panels_PKl)
        self._lanes(first + head + whole, rows_NK[head + whole :])

    def _lanes(self, first: int, rows_NK: Tensor) -> None:
        """Rows that lie within one panel."""
        lane = first % LANES
        if len(rows_NK):
            self.tensor[first // LANES, :, lane : lane + len(rows_NK)].copy_(rows_NK.t())

    def rows(self, first: int, stop: int) -> Tensor:
        """Rows first … stop − 1, [stop − first, K]: a copy, in the weight's dtype."""
        panels_PKl = self.tensor[first // LANES : -(-stop // LANES)]
        start = first // LANES * LANES
        return panels_PKl.transpose(1, 2).reshape(-1, self.shape[1])[first - start : stop - start].clone()


Weight = Tensor | Panels
"""A weight [N, K], as rows or as panels."""


def rows_of(weight: Weight) -> Tensor:
    """A weight that is stored as rows. Raises `TypeError` for panels, which have no gradient."""
    if isinstance(weight, Panels):
        raise TypeError(f"a weight {weight.shape} in panels only serves: load the model without them")
    return weight
