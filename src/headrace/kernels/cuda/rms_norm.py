"""`rms_norm` in Triton: one program a row, the whole row in one tile, so its sum has one shape whatever T is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rms_norm"]


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, row_stride, width, eps, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    inside = columns < width
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=0) / width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, x / tl.sqrt(mean + eps) * weight, mask=inside)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `Ops.rms_norm`. Any number of leading axes; the result is contiguous fp32.

    Warps and tile depend on D alone: a row's bits do not depend on the rows beside it.
    """
    width = x_TD.shape[-1]
    rows_TD = x_TD.reshape(-1, width)
    rows_TD = rows_TD if rows_TD.stride(1) == 1 else rows_TD.contiguous()
    out_TD = torch.empty(rows_TD.shape, dtype=torch.float32, device=x_TD.device)
    tile = triton.next_power_of_2(width)
    if len(rows_TD):
        warps = min(max(tile // 256, 1), 8)
        _rms_norm[(len(rows_TD),)](
            rows_TD, weight_D.contiguous(), out_TD, rows_TD.stride(0), width, eps, TILE=tile, num_warps=warps
        )
    return out_TD.view(x_TD.shape)
