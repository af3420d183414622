"""SARATHI and Sarathi-Serve (Agrawal et al., 2023, 2024): chunked prefill, decode-maximal and stall-free batches."""

from __future__ import annotations

import random
import statistics

import torch

from headrace.bench.load import Job, random_jobs, run_jobs
from headrace.bench.measure import seconds
from headrace.engine.schedule.plan import Plan, Slice
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import ConfigError
from headrace.llm.assemble import profile_budget
from headrace.reproduce.setup import ON, Bench, host_engine, observe
from headrace.reproduce.table import Table

__all__ = ["table"]


def table(quick: bool = False) -> Table:
    """The papers' rows, measured now."""
    out = Table("SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills; Sarathi-Serve", ON)
    bench = Bench()
    out.add("Logits of chunked against whole prefill", "CE", "mathematically equal", chunked(bench))
    out.add("KV of chunk i of N is read again N−i times (host)", "CE", "N−i", rereads())
    out.add("Piggybacking pays most at P:D = C/(B−1) (host)", "CE", "peak at C/(B−1)", best_ratio(quick))
    out.add(
        "Worst time between tokens while a long prompt arrives, orca against sarathi",
        "CR",
        "naive mixed batches up to 28.3×",
        stall(bench, quick),
    )
    out.add("A step of 257 tokens against 256", "CR", "+32% (GPU tiles)", tile(bench, quick))
    out.add("Token budget from a time-between-tokens SLO", "CR", "512 strict, 2048 relaxed", budget(bench))
    out.add("Decode throughput up to 10×, end to end 1.33× (LLaMA-13B, A6000)", "G", "10×, 1.33×", "no GPU in this run")
    out.add(
        "Pipeline bubbles 6.29× fewer, 1.91× end to end", "S", "6.29×, 1.91×", "not in headrace yet: no pipeline stages"
    )
    return out


def chunked(bench: Bench) -> str:
    """The first sampled logits of one prompt, prefilled whole and in chunks."""
    prompt = [random.Random(1).randrange(2, bench.vocab_size) for _ in range(600)]
    rows: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for chunk in (1024, 256, 64, 7):
        engine = bench.engine(max_num_batched_tokens=chunk, num_kv_blocks=64)
        kept.clear()
        observe(engine.runner, "logits", lambda _, logits: kept.append(logits))
        run_jobs(engine, [Job(prompt, 1)])
        rows.append(kept[-1])
    return "equal by == for chunks of 256, 64, 7" if all(torch.equal(rows[0], r) for r in rows) else "NOT equal"


def rereads() -> str:
    """For each chunk, the number of chunks that read its KV."""
    engine = host_engine(256, max_num_batched_tokens=64)
    plans: list[Plan] = []
    observe(engine.runner, "submit", lambda plan, _: plans.append(plan))
    run_jobs(engine, [Job(list(range(512)), 1)])
    chunks = [s for plan in plans for s in plan.slices if len(s.token_ids) > 1]
    counts = [sum(later.start >= s.start + len(s.token_ids) for later in chunks) for s in chunks]
    n = len(chunks)
    return f"{n} chunks: {counts}" + ("" if counts == [n - i for i in range(1, n + 1)] else ", NOT N−i")


def best_ratio(quick: bool) -> str:
    """Steps of prefill and decode apart, over steps of both mixed, by P:D ratio."""
    chunk, batch, output = 64, 9, 32
    best = chunk // (batch - 1)
    count = 60 if quick else 200

    def steps(prompt: int, out: int, tokens: int, seats: int) -> int:
        engine = host_engine(4096, max_num_batched_tokens=tokens, max_num_seqs=seats, prefix_caching=False)
        return run_jobs(engine, random_jobs([(prompt, out)] * count, 90)).steps

    gain: dict[float, float] = {}
    for ratio in (best / 4, best / 2, best, best * 2, best * 4):
        prompt = round(ratio * output)
        alone = steps(prompt, 1, chunk, batch) + steps(1, output, chunk, batch - 1)
        gain[ratio] = alone / steps(prompt, output, chunk + batch - 1, batch)
    peak = max(gain, key=lambda r: gain[r])
    shown = ", ".join(f"{ratio:g}: {value:.2f}×" for ratio, value in gain.items())
    return f"C/(B−1) = {best}; steps saved at P:D {shown}; peak at {peak:g}"


def stall(bench: Bench, quick: bool) -> str:
    """Worst gap between tokens of 8 running requests while a long prompt arrives."""
    draw = random.Random(4)
    short = [Job([draw.randrange(2, 500) for _ in range(16)], 60) for _ in range(8)]
    long = Job([draw.randrange(2, 500) for _ in range(800 if quick else 1900)], 4, arrival=20)
    worst = {}
    for batching in ("orca", "sarathi", "orca", "sarathi"):
        engine = bench.engine(batching=batching, max_num_batched_tokens=64, num_kv_blocks=512)
        outcome = run_jobs(engine, [*short, long])
        worst[batching] = max(b - a for i in range(1, 9) for a, b in zip(outcome.times[i], outcome.times[i][1:]))
    return f"{worst['orca'] * 1e3:.1f} against {worst['sarathi'] * 1e3:.1f} ms: {worst['orca'] / worst['sarathi']:.1f}×"


def tile(bench: Bench, quick: bool) -> str:
    """Time of a prefill step of 257 tokens over one of 256."""
    runner = bench.engine(num_kv_blocks=64).runner

    def step(tokens: int) -> float:
        plan = Plan(0, [Slice(0, 0, [5] * tokens, list(range(1, 18)), [], SamplingParams(), 0, 0)])
        return seconds(lambda: runner.result(runner.submit(plan)))

    step(257)
    ratios = [step(257) / step(256) for _ in range(5 if quick else 15)]
    return f"{statistics.median(ratios) - 1:+.1%} (a tile here is a few rows)"


def budget(bench: Bench) -> str:
    """The budgets of `--max-num-batched-tokens auto` on this machine for this small model."""
    runner = bench.engine(num_kv_blocks=256).runner
    found = []
    for slo in (5.0, 20.0):
        try:
            found.append(f"{profile_budget(runner, 2048, slo)} tokens within {slo:g} ms")
        except ConfigError:
            found.append(f"none within {slo:g} ms")
    return "; ".join(found)
