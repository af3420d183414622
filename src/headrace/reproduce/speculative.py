"""Speculative decoding (Leviathan et al., 2023): its formulae, Algorithm 1 on made-up distributions, and models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.kernels.ops import SampleParams
from headrace.kernels.reference.sample import sample
from headrace.kernels.reference.standard import standardized
from headrace.reproduce.speculative_pair import ON, by_models
from headrace.reproduce.table import Table
from headrace.speculate import formulae
from headrace.speculate.rejection import Rejection, acceptance, draft_params, residual

__all__ = [
    "PUBLISHED",
    "PooledPair",
    "PrefixPair",
    "SyntheticPair",
    "accepted_share",
    "chi_square",
    "direct",
    "generate",
    "induced",
    "random_logits",
    "row_params",
    "step",
    "table",
]

PUBLISHED = {
    (0.6, 2): (1.53, 1.96),
    (0.7, 3): (1.58, 2.53),
    (0.8, 2): (1.23, 2.44),
    (0.8, 5): (1.63, 3.69),
    (0.9, 2): (1.11, 2.71),
    (0.9, 10): (1.60, 6.86),
}
"""Operations and speed at c = ĉ = 0, by (α, γ) (table 1)."""
CLOSENESS = ((3.0, 0.49), (2.0, 1.0), (4.0, 1.62))
"""Spread of the target's logits, and of what the draft model's differ by."""
KNOBS: tuple[dict[str, float], ...] = ({}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 0.7, "min_p": 0.1})


def table(quick: bool = False) -> Table:
    """The paper's rows, computed and drawn now."""
    out = Table(
        "Fast Inference from Transformers via Speculative Decoding",
        f"formulae; pairs of random distributions, verified by the engine's code; {ON}",
    )
    by_formula(out)
    same_distribution(out, 20_000 if quick else 200_000)
    lenience(out)
    alphas(out, 4_000 if quick else 50_000)
    per_step(out, 4_000 if quick else 40_000)
    by_models(out, quick)
    out.add("T5-XXL 11B, batch 1, EnDe, T = 0 and T = 1", "G", "3.4×, 2.6×", "no GPU and no T5 in this run")
    out.add("T5-XXL 11B, batch 1, CNN/DM, T = 0 and T = 1", "G", "3.1×, 2.3×", "no GPU and no T5 in this run")
    return out


# ---- distributions that are made up --------------------------------------------------------------------------------


class SyntheticPair(Protocol):
    """A target and a draft model, as functions of the tokens so far [N, H] to logits [N, V]."""

    def target(self, token_NH: Tensor) -> Tensor:
        """The logits of the next token."""
        ...

    def draft(self, token_NH: Tensor) -> Tensor:
        """The draft model's."""
        ...


def random_logits(rows: int, vocab_size: int, spread: float, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Normal logits [rows, V] of a target, of deviation `spread`, and a draft model's: the same plus normal `noise`."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, vocab_size, generator=generator) * spread
    return target, target + torch.randn(rows, vocab_size, generator=generator) * noise


class PrefixPair:
    """A distribution for each prefix of up to `length` − 1 tokens; the target bans a token after every third prefix."""

    def __init__(self, vocab_size: int, length: int, seed: int = 0) -> None:
        self.vocab_size, self.length = vocab_size, length
        rows = self._start(length)
        self.logits = random_logits(rows, vocab_size, spread=1.2, noise=1.0, seed=seed)
        banned = torch.arange(0, rows, 3)
        self.logits[0][banned, banned % vocab_size] = -torch.inf

    def _start(self, depth: int) -> int:
        """Prefixes shorter than `depth`, which stand before those of this length, in the order of their digits."""
        return int(sum(self.vocab_size**i for i in range(depth)))

    def at(self, depth: int) -> tuple[Tensor, Tensor]:
        """The logits [V^depth, V] of target and draft model after every prefix of `depth` tokens."""
        start, end = self._start(depth), self._start(depth + 1)
        return self.logits[0][start:end], self.logits[1][start:end]

    def number(self, token_NH: Tensor) -> Tensor:
        """Prefixes [N] as numbers, the first token the highest digit."""
        place_H = self.vocab_size ** torch.arange(token_NH.shape[1] - 1, -1, -1)
        return (token_NH * place_H).sum(dim=1)

    def target(self, token_NH: Tensor) -> Tensor:
        """See `SyntheticPair`."""
        return self.at(token_NH.shape[1])[0][self.number(token_NH)]

    def draft(self, token_NH: Tensor) -> Tensor:
        """See `SyntheticPair`."""
        return self.at(token_NH.shape[1])[1][self.number(token_NH)]


@dataclass(frozen=True, slots=True)
class PooledPair:
    """Distributions of a pool, one drawn for each place [N, H]: acceptances are independent, as §3.1 supposes."""

    target_CV: Tensor
    draft_CV: Tensor
    index_NH: Tensor

    def target(self, token_NH: Tensor) -> Tensor:
        """See `SyntheticPair`."""
        return self.target_CV[self.index_NH[:, token_NH.shape[1]]]

    def draft(self, token_NH: Tensor) -> Tensor:
        """See `SyntheticPair`."""
        return self.draft_CV[self.index_NH[:, token_NH.shape[1]]]


def row_params(seed_R: Tensor, position_R: Tensor, **knobs: float) -> SampleParams:
    """Parameters of rows that differ in seed and position alone; temperature is 1 unless given."""
    rows = len(seed_R)

    def full(name: str, off: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), knobs.get(name, off), dtype=dtype)

    return SampleParams(
        temperature_R=full("temperature", 1.0, torch.float32),
        top_k_R=full("top_k", 0, torch.int64),
        top_p_R=full("top_p", 1.0, torch.float32),
        min_p_R=full("min_p", 0.0, torch.float32),
        seed_R=seed_R,
        choice_R=torch.zeros(rows, dtype=torch.int64),
        position_R=position_R,
    )


# ---- steps ---------------------------------------------------------------------------------------------------------


def step(
    pair: SyntheticPair, token_NH: Tensor, seed_N: Tensor, gamma: int, rejection: Rejection | None, **knobs: float
) -> tuple[Tensor, Tensor]:
    """One step after the tokens [N, H]: the rows' tokens [N, γ + 1], and how many of each stand, the last one included.

    Without a `rejection` the rule is the coupled one: both models draw with the same noise, and a draft stands iff it
    is the target's own token.
    """
    count, start = token_NH.shape
    known, q = token_NH, []
    for i in range(gamma):
        own = row_params(seed_N, torch.full((count,), start + i), **knobs)
        logits_NV = pair.draft(known)
        q.append(standardized(logits_NV, own))
        drawn_N = sample(logits_NV, draft_params(own) if rejection else own)
        known = torch.cat([known, drawn_N[:, None]], dim=1)
    logits_RV = torch.stack([pair.target(known[:, : start + i]) for i in range(gamma + 1)], dim=1).flatten(0, 1)
    position_R = torch.arange(start, start + gamma + 1).repeat(count)
    params = row_params(seed_N.repeat_interleave(gamma + 1), position_R, **knobs)
    draft_NG = known[:, start:]
    if rejection:
        given = list(torch.stack(q, dim=1)) if gamma else [None] * count
        token_R = rejection.verify(logits_RV, params, draft_NG.tolist(), given)
    else:
        token_R = sample(logits_RV, params)
    row_NG = token_R.view(count, gamma + 1)
    return row_NG, 1 + (row_NG[:, :gamma] == draft_NG).long().cumprod(dim=1).sum(dim=1)


def generate(pair: PrefixPair, seed_N: Tensor, gamma: int, rejection: Rejection | None, **knobs: float) -> Tensor:
    """Sequences of the pair's length [N, length], in as many steps as each needs."""
    count, length = len(seed_N), pair.length
    out_NH = torch.zeros(count, length, dtype=torch.int64)
    have_N = torch.zeros(count, dtype=torch.int64)
    for have in range(length):
        here = (have_N == have).nonzero()[:, 0]
        if not len(here):
            continue
        drafts = min(gamma, length - have - 1)
        row_NG, stand_N = step(pair, out_NH[here, :have], seed_N[here], drafts, rejection, **knobs)
        out_NH[here, have : have + drafts + 1] = row_NG  # what does not stand is written over
        have_N[here] += stand_N
    return out_NH


def accepted_share(pool: tuple[Tensor, Tensor], draws: int, rejection: Rejection | None) -> float:
    """The share of single drafts that stand, over a pool of distributions, each drawn as often as the others."""
    stand, chunk = 0, 2_000
    for first in range(0, draws, chunk):
        seed_N = torch.arange(first, min(first + chunk, draws))
        pair = PooledPair(*pool, (seed_N % len(pool[0]))[:, None].expand(-1, 2))
        stand += int((step(pair, torch.zeros(len(seed_N), 0).long(), seed_N, 1, rejection)[1] - 1).sum())
    return stand / draws


# ---- distributions in closed form ----------------------------------------------------------------------------------


def _standard_at(pair: PrefixPair, depth: int, **knobs: float) -> tuple[Tensor, Tensor]:
    """p and q [V^depth, V] after every prefix of `depth` tokens."""
    p_logits, q_logits = pair.at(depth)
    zero_R = torch.zeros(len(p_logits), dtype=torch.int64)
    params = row_params(zero_R, zero_R, **knobs)
    return standardized(p_logits, params), standardized(q_logits, params)


def direct(pair: PrefixPair, **knobs: float) -> Tensor:
    """The probabilities [V^length] of the target's sequences: products of its conditionals."""
    out = torch.ones(pair.vocab_size**pair.length, 1, dtype=torch.float64)
    for depth in reversed(range(pair.length)):
        out = _chained(_standard_at(pair, depth, **knobs)[0], out)
    return out[0]


def induced(pair: PrefixPair, lenience: float = 1.0, **knobs: float) -> Tensor:
    """The probabilities [V^length] that Algorithm 1 gives each sequence, where its first step has length − 1 drafts.

    Behind a rejected draft the target samples the other tokens one at a time.

    Uniform numbers and residual draws are integrated out: the sampler's own `acceptance` and `residual` are the
    probabilities of its decisions. From the last place back, a sequence either keeps its token as the draft, and
    later places are again drafts or the bonus, or has it from the residual, and later tokens are the target's.
    """
    vocab_size, last = pair.vocab_size, pair.length - 1
    alone = torch.ones(vocab_size**pair.length, 1, dtype=torch.float64)
    alone = kept = _chained(_standard_at(pair, last, **knobs)[0], alone)
    for depth in reversed(range(last)):
        p, q = _standard_at(pair, depth, **knobs)
        rows_of_p, rows_of_q = (x.repeat_interleave(vocab_size, dim=0) for x in (p, q))
        every_token = torch.arange(vocab_size).repeat(len(p))
        odds = acceptance(rows_of_p, rows_of_q, every_token, lenience).view(len(p), vocab_size)
        rejected = (q * (1 - odds)).sum(dim=1, keepdim=True)
        kept = _chained(q * odds, kept) + _chained(rejected * residual(p, q, lenience), alone)
        alone = _chained(p, alone)
    return kept[0]


def _chained(first: Tensor, rest: Tensor) -> Tensor:
    """Of a token after each prefix [P, V], and what follows it [P · V, S]: of both [P, V · S]."""
    return (first.reshape(-1, 1) * rest).view(len(first), -1)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """The probability of counts that are at least this far from the expected; cells of less than 5 become one.

    0 where something was counted that cannot be.
    """
    if counts[expected == 0].sum() > 0:
        return 0.0
    small = expected < 5
    seen, wanted = (torch.cat([x[~small].double(), x[small].double().sum()[None]]) for x in (counts, expected))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    if len(wanted) < 2:
        return 1.0
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), statistic / 2))


# ---- rows ----------------------------------------------------------------------------------------------------------


def by_formula(out: Table) -> None:
    """Table 1, and what §3 says of the best γ, over a grid of α and c."""
    for (alpha, gamma), published in PUBLISHED.items():
        out.add(
            f"α = {alpha:g}, γ = {gamma}, c = 0: operations / speed",
            "CE",
            " / ".join(f"{x:.2f}×" for x in published),
            f"{formulae.operations(alpha, gamma, 0):.2f}× / {formulae.speedup(alpha, gamma, 0):.2f}×",
        )
    grid = [(a / 50, c / 50) for a in range(50) for c in range(1, 51)]
    brute = [max(range(65), key=lambda gamma: formulae.speedup(alpha, gamma, c)) for alpha, c in grid]
    found = [formulae.best_gamma(alpha, c, 64) for alpha, c in grid]
    same = sum(a == b for a, b in zip(brute, found))
    out.add("The best γ(α, c), against all from 0 to 64", "CE", "§3.5", f"equal in {same} of {len(grid)}")
    right = [formulae.improves(alpha, c) == (gamma > 0) for (alpha, c), gamma in zip(grid, brute)]
    least = [
        formulae.speedup(alpha, gamma, c) >= formulae.least_speedup(alpha, c)
        for (alpha, c), gamma in zip(grid, brute)
        if gamma > 0
    ]
    out.add(
        "Some γ is faster iff α > c, by (1 + α)/(1 + c) or more",
        "CE",
        "corollary 3.9",
        f"{sum(right)} of {len(right)}; by that or more in {sum(least)} of {len(least)}",
    )


def same_distribution(out: Table, draws: int) -> None:
    """Algorithm 1 against the target alone: in closed form, and by draws."""
    far = 0.0
    for vocab_size, length in ((5, 2), (4, 3), (5, 4)):
        for knobs in KNOBS:
            pair = PrefixPair(vocab_size, length)
            far = max(far, float((induced(pair, **knobs) - direct(pair, **knobs)).abs().max()))
    out.add(
        "Probabilities of sequences, all enumerated (V to 5, γ to 3; plain, top-k, top-p, min-p)",
        "CE",
        "those of the target",
        f"equal within {far:.0e}" if far < 1e-12 else f"NOT equal: {far:.1e} apart",
    )
    pair = PrefixPair(4, 3)
    for name, rejection in (("Algorithm 1", Rejection()), ("the coupled rule", None)):
        chances = []
        for i, knobs in enumerate(KNOBS, 1):
            own_seeds = torch.arange(i * draws, (i + 1) * draws)  # with the same ones, all four would share their luck
            token_NH = generate(pair, own_seeds, 2, rejection, **knobs)
            counts = torch.bincount(pair.number(token_NH), minlength=4**3)
            chances.append(chi_square(counts, direct(pair, **knobs) * draws))
        out.add(
            f"χ² of {draws} sequences by {name}, the same four ways",
            "CE",
            "those of the target" if rejection else "not in the paper",
            "p = " + ", ".join(f"{chance:.2f}" for chance in chances),
        )


def lenience(out: Table) -> None:
    """What lenience allows, by enumeration of single tokens."""
    told = []
    for value in (1.0, 0.7, 0.4):
        pairs = [PrefixPair(5, 2, seed) for seed in range(20)]
        first = [_standard_at(pair, 0) for pair in pairs]
        ratio, share = 0.0, 0.0
        for pair, (p, q) in zip(pairs, first):
            got = induced(pair, value).view(5, 5).sum(dim=1)
            ratio = max(ratio, float((got / p[0])[p[0] > 0].max()))
            share += float((q[0] * acceptance(p.expand(5, 5), q.expand(5, 5), torch.arange(5), value)).sum()) / 20
        told.append(f"l = {value:g}: α {share:.2f}, at most {ratio:.2f}·p")
    out.add("Lenience: no token of probability above p/l", "CE", "≤ p/l", "; ".join(told))


def alphas(out: Table, draws: int) -> None:
    """Both rules' α of random pairs, by formula and by draws."""
    for spread, noise in CLOSENESS:
        pool = random_logits(32, 200, spread, noise, seed=1)
        p, q = (logits.double().softmax(dim=1).tolist() for logits in pool)
        rules: list[tuple[str, str, Any, Rejection | None]] = [
            ("Algorithm 1", "Σ min(p, q)", formulae.alpha_rejection, Rejection()),
            ("the coupled rule", "not in the paper", formulae.alpha_coupled, None),
        ]
        for name, published, formula, rejection in rules:
            value = sum(formula(*pair) for pair in zip(p, q)) / len(p)
            out.add(
                f"α of {name}, random pairs over 200 tokens (deviations {spread:g}, {noise:g})",
                "CE",
                published,
                f"{value:.3f}; {accepted_share(pool, draws, rejection):.3f} of {draws} draws",
            )


def per_step(out: Table, draws: int) -> None:
    """Tokens of a step by draws, beside the formula's, for both rules."""
    for gamma in (2, 5):
        pool = random_logits(64, 32, spread=2.0, noise=0.7, seed=2)
        generator = torch.Generator().manual_seed(3)
        pair = PooledPair(*pool, torch.randint(64, (draws, gamma + 1), generator=generator))
        p, q = (logits.double().softmax(dim=1).tolist() for logits in pool)
        told = []
        for name, formula, rejection in (
            ("Algorithm 1", formulae.alpha_rejection, Rejection()),
            ("coupled", formulae.alpha_coupled, None),
        ):
            alpha = sum(formula(*both) for both in zip(p, q)) / len(p)
            stand_N = step(pair, torch.zeros(draws, 0).long(), torch.arange(draws), gamma, rejection)[1]
            mean, predicted = float(stand_N.double().mean()), formulae.tokens_per_step(alpha, gamma)
            told.append(f"{name} {mean:.3f}, by formula {predicted:.3f} (α = {alpha:.3f})")
        out.add(f"Tokens per step, γ = {gamma}", "CR", "(1 − α^{γ+1})/(1 − α)", "; ".join(told))
