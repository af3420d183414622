"""Sampling in torch: which tokens are kept, and the counter-based noise that picks among them.

Everything a draw depends on is in its row: no generator has a state. Sums of probabilities are integers
(weights relative to the best token, times 2⁴⁰), so they are exact in any order, and top-p's
cut does not depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.ops import SampleParams

__all__ = [
    "FIXED_POINT",
    "first_argmax",
    "gumbel",
    "kept",
    "kept_tokens",
    "mix",
    "ordered",
    "row_keys",
    "sample",
    "scaled",
    "uniform",
]

FIXED_POINT = 2.0**40
"""Probability weights are summed as integers of 2⁻⁴⁰ of the best token's."""

# splitmix64 (Steele, Lea, Flood 2014): the increment and the two multipliers, as signed 64-bit integers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 bit patterns."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer: a bijection of 64 bits."""
    x = (x ^ _shift(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift(x, 27)) * _MULTIPLY_2
    return x ^ _shift(x, 31)


def row_keys(seed_R: Tensor, choice_R: Tensor, position_R: Tensor) -> Tensor:
    """The 64-bit key of each row's noise, from its seed, choice index and absolute position."""
    key_R = mix(seed_R.long() + _STEP)
    key_R = mix((key_R ^ choice_R.long()) + _STEP)
    return mix((key_R ^ position_R.long()) + _STEP)


def kept(key: int, row_T: Tensor, first_feature: int, width: int, bar: int) -> Tensor:
    """Which of the elements first_feature … of each row dropout keeps, bool [T, width]: 31 bits reach `bar`."""
    key_T = mix(torch.tensor(key, device=row_T.device) + _STEP)
    key_T = mix((key_T ^ row_T.long()) + _STEP)
    count_D = first_feature + torch.arange(1, width + 1, dtype=torch.int64, device=row_T.device)
    return _shift(mix(key_T[:, None] + count_D * _STEP), 33) >= bar


def gumbel(key_R: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [R, V], fp32: token i's is a function of its row's key and of i.

    31 bits make v = (k + ½)·2⁻³¹ in (0, 1), whose small values are fine-grained; the noise is
    −log(−log(1 − v)), so a large draw (v near 0) is as exact as fp32 allows.
    """
    count_V = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=key_R.device)
    bits_RV = _shift(mix(key_R[:, None] + count_V * _STEP), 33)
    v_RV = ((bits_RV.float() + 0.5) * 2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-v_RV))


def uniform(key_R: Tensor) -> Tensor:
    """One uniform number of each row's key [R], fp64: (k + ½)·2⁻⁵² of 52 bits, so never 0 or 1."""
    return (_shift(mix(key_R + _STEP), 12).double() + 0.5) * 2.0**-52


def ordered(logits_RV: Tensor) -> Tensor:
    """Logits that have an order: NaN becomes -inf, and +inf the largest finite number."""
    return torch.nan_to_num(logits_RV.float(), nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)


def sample(logits_RV: Tensor, params: SampleParams) -> Tensor:
    """See `Ops.sample`. A row of nothing but -inf and NaN gives token 0."""
    device, vocab_size = logits_RV.device, logits_RV.shape[1]
    if logits_RV.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=device)
    z_RV, y_RV, greedy_R1 = scaled(logits_RV, params)
    keys_R = row_keys(params.seed_R, params.choice_R, params.position_R).to(device)
    drawn_RV = torch.where(kept_tokens(z_RV, y_RV, params), y_RV + gumbel(keys_R, vocab_size), -torch.inf)
    return first_argmax(torch.where(greedy_R1, z_RV, drawn_RV))


def scaled(logits_RV: Tensor, params: SampleParams) -> tuple[Tensor, Tensor, Tensor]:
    """(z [R, V], y [R, V], greedy [R, 1]): ordered logits, (z − best z) / temperature, and which rows are argmax.

    A row of nothing but -inf has y = -inf. y of a greedy row is that of temperature 1.
    """
    z_RV = ordered(logits_RV)
    best_R1 = z_RV.amax(dim=1, keepdim=True)
    best_R1 = torch.where(best_R1 == -torch.inf, 0.0, best_R1)
    temperature_R1 = params.temperature_R.to(logits_RV.device, torch.float32)[:, None]
    greedy_R1 = temperature_R1 <= 0
    return z_RV, (z_RV - best_R1) / torch.where(greedy_R1, 1.0, temperature_R1), greedy_R1


def first_argmax(x_RV: Tensor) -> Tensor:
    """argmax with ties to the lowest id, which torch.argmax does not promise."""
    return (x_RV == x_RV.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1)


def kept_tokens(z_RV: Tensor, y_RV: Tensor, params: SampleParams) -> Tensor:
    """Which tokens top-k, top-p and min-p leave, bool [R, V]. y is `scaled`'s: a weight is exp(y) ≤ 1."""
    device, vocab_size = z_RV.device, z_RV.shape[1]
    top_k_R1 = params.top_k_R.to(device, torch.int64)[:, None]
    top_p_R1 = params.top_p_R.to(device, torch.float32)[:, None]
    min_p_R1 = params.min_p_R.to(device, torch.float32)[:, None]
    order_RV = z_RV.sort(dim=1, descending=True, stable=True).indices
    weight_RV = torch.exp(y_RV.gather(1, order_RV))
    rank_V = torch.arange(vocab_size, device=device)
    in_top_k_RV = (top_k_R1 <= 0) | (rank_V < top_k_R1)

    fixed_RV = torch.where(in_top_k_RV, (weight_RV * FIXED_POINT).to(torch.int64), 0)
    total_R1 = fixed_RV.sum(dim=1, keepdim=True)
    target_R1 = (top_p_R1.double() * total_R1.double()).ceil().to(torch.int64).clamp_(min=1)
    before_RV = fixed_RV.cumsum(dim=1) - fixed_RV
    in_top_p_RV = (top_p_R1 >= 1) | (before_RV < torch.minimum(target_R1, total_R1))

    in_min_p_RV = weight_RV >= min_p_R1
    kept_RV = in_top_k_RV & in_top_p_RV & in_min_p_RV
    return torch.zeros_like(kept_RV).scatter_(1, order_RV, kept_RV)
