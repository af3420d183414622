"""What speculative decoding gains (2211.17192 §3), in plain floats.

α is the probability that a draft is accepted, γ the number of drafts in a step, c the time of one run of the draft
model over one of the target's, ĉ the same of their arithmetic operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "alpha_coupled",
    "alpha_rejection",
    "best_gamma",
    "improves",
    "least_speedup",
    "operations",
    "speedup",
    "tokens_per_step",
]


def tokens_per_step(alpha: float, gamma: int) -> float:
    """Expected tokens of a step, (1 − α^{γ+1}) / (1 − α), or γ + 1 at α = 1 (equation 1).

    Summed as 1 + α + … + α^γ, which is exact where that quotient is 0/0 and close to it. Raises ValueError for α
    outside [0, 1] or γ < 0.
    """
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(f"α must be from 0 to 1 and γ at least 0, not {alpha} and {gamma}")
    total = 1.0
    for _ in range(gamma):
        total = 1.0 + alpha * total
    return total


def speedup(alpha: float, gamma: int, c: float) -> float:
    """The factor of wall time, (1 − α^{γ+1}) / ((1 − α)(γc + 1)) (theorem 3.8).

    It supposes that the target computes γ + 1 tokens in the time of one.
    """
    return tokens_per_step(alpha, gamma) / (gamma * c + 1)


def operations(alpha: float, gamma: int, c_hat: float) -> float:
    """The factor by which arithmetic grows, (1 − α)(γĉ + γ + 1) / (1 − α^{γ+1}) (theorem 3.11)."""
    return (gamma * c_hat + gamma + 1) / tokens_per_step(alpha, gamma)


def best_gamma(alpha: float, c: float, most: int) -> int:
    """The smallest γ ≤ `most` of the largest speed-up (§3.5): 0 where drafting does not pay.

    The tokens are concave in γ and the time is linear, so their quotient rises and then falls: the search ends at the
    first γ that brings nothing.
    """
    gamma = 0
    while gamma < most and speedup(alpha, gamma + 1, c) > speedup(alpha, gamma, c):
        gamma += 1
    return gamma


def improves(alpha: float, c: float) -> bool:
    """Whether some γ is faster than none: iff α > c (corollary 3.9)."""
    return alpha > c


def least_speedup(alpha: float, c: float) -> float:
    """(1 + α) / (1 + c): what the best γ gains at least where it improves, as γ = 1 gains that (corollary 3.9)."""
    return (1 + alpha) / (1 + c)


def alpha_rejection(p: Sequence[float], q: Sequence[float]) -> float:
    """Σ min(p, q): the probability that Algorithm 1 accepts a draft of q (corollary 3.6). Both are standardized."""
    return math.fsum(min(pair) for pair in zip(p, q, strict=True))


def alpha_coupled(p: Sequence[float], q: Sequence[float]) -> float:
    """The probability that draws from p and q with the same Gumbel noise are equal. Both are standardized.

    argmax(log p + g) = argmax(log q + g) = x iff the exponential clocks exp(−g) ring for x first in both, of
    probability 1 / Σᵧ max(pᵧ/pₓ, qᵧ/qₓ). Never more than `alpha_rejection`, and equal where q is a point mass.
    """
    pairs = [pair for pair in zip(p, q, strict=True) if max(pair) > 0]
    both = [(a, b) for a, b in pairs if a > 0 and b > 0]
    return math.fsum(1 / math.fsum(max(y / a, z / b) for y, z in pairs) for a, b in both)
