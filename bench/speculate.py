"""Speculation beside none, beside the best fixed γ, beside its formulae and beside llama.cpp's.

    python bench/speculate.py [--quick] [--only hurts,repeats,pair,formula,llama] [--rounds 9]

    hurts     random weights at temperature 1, 1, 16 and 64 at once and with prompts that arrive: nobody can guess, and
              every draft is wrong. Each proposer with --gamma auto, over off: at least 0.97
    repeats   40 samples of a story, questions asked again, texts with a prediction (one token of 20 is another; a span
              every 40 tokens is), 1 and 8 at once: at least 1.5 and 1.3 times off
    pair      the trained pair, one request at a time, at temperature 0 and 1: at least 1.5 and 1.25 times off
    formula   tokens a step of a fixed γ over (1 − α^{γ+1})/(1 − α): within 5% where acceptances are independent
    llama     llama-server with the same pair, by token ids: with its own draft and its own lookup, over ours

In each cell of the first three, every fixed γ from 1 to 8 runs too; the best one runs in all rounds, beside off and
auto, and auto is to have 0.95 of the best of these (off among them). All sides of a round give the same tokens, or the
script ends. Two threads. Writes docs/results/speculate.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import speculate_llama
import speculate_work as work
from headrace.bench.measure import in_turn, pairs, rates, write_results
from headrace.kernels.load import load_ops
from headrace.speculate import formulae
from speculate_work import Engine, Load, Models

GAMMAS = range(1, 9)
FINALISTS = 1
SCREENING = 1
"""Rounds of each fixed γ before the best one runs in all."""
NAME = "speculate"
Section = Callable[["Bench"], None]


class Bench:
    """Sides in turn, and what they gave."""

    def __init__(self, rounds: int, quick: bool, results: dict[str, Any]) -> None:
        self.rounds, self.quick, self.results = rounds, quick, results
        self.ops = load_ops("cpu", threads=2)

    def cell(
        self,
        section: str,
        name: str,
        models: Models,
        speculate: str,
        load: Load,
        bars: tuple[float, float],
        plain: Load | None = None,
        **options: Any,
    ) -> None:
        """Measure auto, off and every fixed γ on one load. `plain` is the load as off gets it, without predictions.

        `bars` are those of auto over off, and over the best of off and the fixed γ.
        """
        engines = self._engines(models, speculate, options)
        number = 0
        found: dict[int, list[list[int]]] = {}

        def side(which: str) -> Callable[[], float]:
            counts = iter(range(10**6))

            def run() -> float:
                at = number + next(counts)
                ran = engines[which].run((plain or load if which == "off" else load)(at))
                if found.setdefault(at, ran.tokens) != ran.tokens:
                    raise SystemExit(f"{name}: γ = {which} gave other tokens: a bug in headrace")
                return ran.rate

            return run

        screened = list(engines)[2:]
        medians = dict(zip(screened, map(statistics.median, in_turn([side(g) for g in screened], SCREENING))))
        number += 1 + SCREENING
        finalists = sorted(screened, key=medians.__getitem__, reverse=True)[:FINALISTS]
        sides = ["off", "auto", *finalists]
        rates_of = dict(zip(sides, in_turn([side(which) for which in sides], self.rounds)))
        best = max(("off", *finalists), key=lambda which: statistics.median(rates_of[which]))
        over_off, over_best = pairs(rates_of["auto"], rates_of["off"]), pairs(rates_of["auto"], rates_of[best])
        steps, accepted, _ = engines["auto"].drafts
        fails = [bar for bar, got in zip(bars, (over_off, over_best)) if got.ratio < bar]
        print(
            f"{section:8} {name:34} off {statistics.median(rates_of['off']):7.1f} tok/s   auto {over_off.verdict:28}"
            f" of γ = {best:3} {over_best.verdict:28} {'BELOW ' + ', '.join(map(str, fails)) if fails else ''}",
            flush=True,
        )
        self.results.setdefault(section, {})[name] = {
            "speculate": speculate,
            "off": over_off,
            "best": over_best,
            "best_gamma": best,
            "screened": medians,
            "rates": rates_of,
            "bars": bars,
            "drafted_steps": steps,
            "accepted": accepted,
        }

    def _engines(self, models: Models, speculate: str, options: dict[str, Any]) -> dict[str, Engine]:
        """Off, auto, and every fixed γ."""
        fixed = "ngram" if speculate == "off" else speculate  # a prediction comes first there
        gammas = GAMMAS[::4] if self.quick else GAMMAS
        engines = {"off": Engine(models, **options), "auto": Engine(models, speculate, **options)}
        return engines | {str(g): Engine(models, fixed, gamma=str(g), **options) for g in gammas}


def hurts(bench: Bench) -> None:
    """Where every draft is wrong."""
    models = work.random_pair(bench.ops)
    for speculate in ("ngram", "suffix", "draft:random"):
        for batch, output in ((1, 96), (16, 24), (64, 10)):
            name, load = f"{speculate.partition(':')[0]}, batch {batch}", work.noise(batch, output)
            bench.cell("hurts", name, models, speculate, load, (0.97, 0.95))
        name = f"{speculate.partition(':')[0]}, prompts arrive"
        bench.cell("hurts", name, models, speculate, work.arriving(16), (0.97, 0.95), max_num_seqs=8)


def repeats(bench: Bench) -> None:
    """Where texts repeat others."""
    models = work.trained_pair(bench.ops)
    writer = Engine(models)
    for seats, bar in ((1, 1.5), (8, 1.3)):
        loads: list[tuple[str, str, Load, Load | None]] = [
            ("a story's samples", "suffix", work.story_samples(), None),
            ("questions again", "suffix", work.questions_again(), None),
            ("prediction", "off", *work.predicted(writer, work.replaced, 8)),
            ("edits", "off", *work.predicted(writer, work.edited, 8)),
        ]
        for name, speculate, load, plain in loads:
            cell = f"{name}, batch {seats}"
            bench.cell("repeats", cell, models, speculate, load, (bar, 0.95), plain, max_num_seqs=seats)


def pair(bench: Bench) -> None:
    """The trained pair, alone and eight at once."""
    models = work.trained_pair(bench.ops)
    for seats, bars in ((1, (1.5, 1.25)), (8, (0.97, 0.97))):
        for temperature, bar in zip((0.0, 1.0), bars):
            name = f"T = {temperature:g}, batch {seats}"
            load = work.stories(8, temperature)
            bench.cell("pair", name, models, "draft:pair", load, (bar, 0.95), max_num_seqs=seats)


def formula(bench: Bench) -> None:
    """Tokens of a step beside the formula: independent acceptances, then the trained pair's."""
    models, p, q = work.known_pair(bench.ops)
    for verifier, alpha_of in (("coupled", formulae.alpha_coupled), ("rejection", formulae.alpha_rejection)):
        alpha = alpha_of(p, q)
        for gamma in (1, 2, 3, 5, 8):
            _formula(
                bench, models, f"independent, {verifier}, γ = {gamma}", verifier, gamma, work.steady(8, 1500), alpha
            )
    for verifier in ("coupled", "rejection"):
        for gamma in (3, 6):
            name, load = f"trained, {verifier}, γ = {gamma}", work.stories(16, 1.0)
            _formula(bench, work.trained_pair(bench.ops), name, verifier, gamma, load, None)


def _formula(
    bench: Bench, models: Models, name: str, verifier: str, gamma: int, load: Load, alpha: float | None
) -> None:
    """One row. Without an α, it is the share of first drafts that were accepted, and the gap has no bar."""
    engine = Engine(models, "draft:pair", gamma=str(gamma), verifier=verifier)
    engine.run(load(0))
    steps, accepted, at = engine.drafts
    known = alpha if alpha is not None else at[0] / steps
    got, expected = (accepted + steps) / steps, formulae.tokens_per_step(known, gamma)
    gap = got / expected - 1
    fails = alpha is not None and abs(gap) > 0.05
    told = f"α {known:.3f}: {got:.3f} tokens a step, {expected:.3f} by formula, {gap:+.1%}"
    print(f"formula  {name:34} {told}{' BELOW' * fails}", flush=True)
    bench.results.setdefault("formula", {})[name] = {
        "alpha": known,
        "gamma": gamma,
        "tokens_per_step": got,
        "formula": expected,
        "bar": None if alpha is None else 0.05,
    }


def llama(bench: Bench) -> None:
    """Beside llama.cpp's speculation."""
    bench.results["llama"] = speculate_llama.compare(bench.ops, bench.rounds)


SECTIONS: dict[str, Section] = {f.__name__: f for f in (formula, pair, repeats, hurts, llama)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the chosen sections; the results of others stay in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round and three γ, to try the script; writes nothing")
    parser.add_argument("--only", default=",".join(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(arguments)
    file = Path("docs/results") / f"{NAME}.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() and not given.quick else {}
    results.pop("machine", None)
    for name in given.only.split(","):
        results.pop(name, None)
        bench = Bench(1 if given.quick else given.rounds, given.quick, results)
        before = rates(2)
        SECTIONS[name](bench)
        results[f"{name} rates"] = {"before": before, "after": rates(2)}
        if not given.quick:
            write_results(NAME, results)


if __name__ == "__main__":
    main()
