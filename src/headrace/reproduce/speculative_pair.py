"""Speculative decoding with models: tokens, operations and times of real steps beside the paper's formulae.

The models' next token never depends on the ones before it, so acceptances are independent, as §3.1 supposes, and α is
known exactly; what they cost is what models of their shapes cost.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import NamedTuple

from headrace.bench.models import SHAPES, independent_pair
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.kernels.load import load_ops
from headrace.kernels.ops import Ops
from headrace.llm.assemble import assemble
from headrace.llm.options import EngineOptions
from headrace.llm.speculation import block_weights
from headrace.model.transformer import Transformer
from headrace.reproduce.table import Table
from headrace.speculate import formulae

__all__ = ["ON", "by_models"]

ON = "models of 12M and 0.5M parameters, batch 1"
TARGET = replace(
    SHAPES["tiny"],
    hidden_size=384,
    intermediate_size=1152,
    num_layers=6,
    num_heads=6,
    num_kv_heads=6,
    head_dim=64,
    tie_word_embeddings=False,
)
DRAFT = replace(TARGET, hidden_size=128, intermediate_size=384, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32)
GAMMAS = (1, 2, 3, 5, 8)
NOISES = (0.3, 1.0, 6.0)
"""Deviations of the draft's logits from the target's: nearly always right, often, and hardly ever."""
KV_BYTES = 64 * 2**20


class _Measured(NamedTuple):
    """One engine's run: tokens per second, tokens for each step that had drafts, and weights read for each token."""

    rate: float
    per_step: float
    operations: float


class _Pair:
    """A target and a draft model of a known α."""

    def __init__(self, ops: Ops, noise: float, tokens: int) -> None:
        self._ops, self._tokens = ops, tokens
        (self.target, self.draft), (p, q) = independent_pair((TARGET, DRAFT), ops, noise, seed=5)
        self.alpha = {"coupled": formulae.alpha_coupled(p, q), "rejection": formulae.alpha_rejection(p, q)}

    def run(self, model: Transformer, gamma: int = 0, verifier: str = "coupled", rounds: int = 3) -> _Measured:
        """One request at temperature 1; the median rate of some rounds, each after the first token."""
        options = EngineOptions(kv_cache_memory=KV_BYTES)
        if gamma:
            options = replace(options, speculate="draft:pair", gamma=str(gamma), verifier=verifier)
        engine = assemble(model, self._ops, options, draft=self.draft if gamma else None)
        rates = []
        for number in range(rounds):
            params = SamplingParams(max_tokens=self._tokens, ignore_eos=True)
            engine.scheduler.add(Request(number, [1, 2, 3], params, seed=number))
            first = len(engine.step()[0].token_ids)
            began = time.perf_counter()
            while engine.has_work:
                engine.step()
            rates.append((self._tokens - first) / (time.perf_counter() - began))
        stats = engine.scheduler.stats
        steps = max(stats.draft_steps, 1)
        rows = (stats.draft_steps + stats.drafted_tokens + stats.drafted_tokens * C_HAT) / steps
        per_step = 1 + stats.accepted_tokens / steps
        return _Measured(statistics.median(rates), per_step, rows / per_step)


C_HAT = block_weights(DRAFT) / block_weights(TARGET)
"""ĉ: the draft model's multiplications for a token over the target's."""


def by_models(out: Table, quick: bool = False) -> None:
    """The rows that need models: some seconds, or a minute."""
    ops = load_ops("cpu")
    gammas, noises, tokens = (GAMMAS[:3:2], NOISES[1:2], 240) if quick else (GAMMAS, NOISES, 240)
    for noise in noises:
        pair = _Pair(ops, noise, tokens)
        alone, small = pair.run(pair.target).rate, pair.run(pair.draft).rate
        c = alone / small
        found = {gamma: pair.run(pair.target, gamma) for gamma in gammas}
        alpha = pair.alpha["coupled"]
        told = f"coupled, α = {alpha:.2f}, c = {c:.2f}, γ = {', '.join(map(str, gammas))}"
        _row(
            out,
            f"Tokens per step; {told}",
            [(formulae.tokens_per_step(alpha, gamma), one.per_step) for gamma, one in found.items()],
        )
        _row(
            out,
            f"Operations, ĉ = {C_HAT:.2f}; {told}",
            [(formulae.operations(alpha, gamma, C_HAT), one.operations) for gamma, one in found.items()],
        )
        _row(
            out,
            f"Wall time; {told}",
            [(formulae.speedup(alpha, gamma, c), one.rate / alone) for gamma, one in found.items()],
        )
        best = max(found, key=lambda gamma: found[gamma].rate)
        measured = best if found[best].rate > alone else 0
        out.add(
            f"The best γ; α = {alpha:.2f}, c = {c:.2f}",
            "CR",
            f"{formulae.best_gamma(alpha, c, max(gammas))} of 0 to {max(gammas)}",
            f"{measured} of 0, {', '.join(map(str, gammas))}",
        )
        out.add(
            f"Faster iff α > c; α = {alpha:.2f}, c = {c:.2f}",
            "CR",
            f"yes, by {formulae.least_speedup(alpha, c):.2f}× or more" if formulae.improves(alpha, c) else "no",
            f"{'yes' if measured else 'no'}: {found[best].rate / alone:.2f}× at γ = {best}",
        )
        one = pair.run(pair.target, 3, "rejection")
        expected = formulae.tokens_per_step(pair.alpha["rejection"], 3)
        _row(out, f"Tokens per step; Algorithm 1, α = {pair.alpha['rejection']:.2f}, γ = 3", [(expected, one.per_step)])


def _row(out: Table, what: str, figures: list[tuple[float, float]]) -> None:
    """A row of values by formula and as measured."""
    formula, measured = (", ".join(f"{x:.2f}" for x in column) for column in zip(*figures))
    out.add(what, "CR", f"by formula {formula}", measured)
