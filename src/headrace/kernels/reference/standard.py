"""The distribution that `sample` draws from, as numbers: what verifying drafts compares (2211.17192 §2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.ops import SampleParams
from headrace.kernels.reference.sample import FIXED_POINT, first_argmax, kept_tokens, scaled

__all__ = ["standardized"]


def standardized(logits_RV: Tensor, params: SampleParams) -> Tensor:
    """Probabilities [R, V], fp64, after temperature, top-k, top-p and min-p, of the tokens that `sample` keeps.

    They are quotients of `sample`'s integers (weights times 2⁴⁰), so a row does not depend on the other rows or on an
    order of sums; a token of less than 2⁻⁴⁰ of the best one's weight has probability 0. Rows at temperature 0, and
    rows of nothing but -inf and NaN, have all of it at the token that `sample` gives.
    """
    z_RV, y_RV, greedy_R1 = scaled(logits_RV, params)
    if logits_RV.shape[0] == 0:
        return z_RV.double()
    weight_RV = torch.where(kept_tokens(z_RV, y_RV, params), (torch.exp(y_RV) * FIXED_POINT).to(torch.int64), 0)
    total_R1 = weight_RV.sum(dim=1, keepdim=True)
    certain_RV = torch.zeros_like(z_RV, dtype=torch.float64).scatter_(1, first_argmax(z_RV)[:, None], 1.0)
    p_RV = weight_RV.double() / total_R1.clamp(min=1).double()
    return torch.where(greedy_R1 | (total_R1 == 0), certain_RV, p_RV)
