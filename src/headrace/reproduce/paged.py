"""PagedAttention (Kwon et al., 2023): memory waste, sharing, capacity, and equality with contiguous KV."""

from __future__ import annotations

import itertools
import random

import torch

from headrace.attention.context import packed_positions
from headrace.attention.dense import DenseContext
from headrace.bench.load import Job, conversation_lengths, random_jobs, run_jobs
from headrace.engine.schedule.beam import BeamSearch
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.reproduce.setup import ON, Bench, host_engine, observe
from headrace.reproduce.table import Table

__all__ = ["table"]

BUDGET_TOKENS = 16384
"""KV slots of every allocator."""


def table(quick: bool = False) -> Table:
    """The paper's rows, measured now."""
    out = Table("PagedAttention: Efficient Memory Management for Large Language Model Serving", ON)
    bench = Bench()
    out.add("Output equals that of contiguous KV", "CE", "equal", contiguous(bench))
    out.add("Waste of a sequence of L tokens in blocks of B: ⌈L/B⌉B−L", "CE", "at most B−1 = 15 slots", waste(quick))
    lengths = conversation_lengths(60 if quick else 300, 0.25)
    for reserve, paper in (
        ("max", "20.4–38.2% over earlier systems"),
        ("pow2", "20.4–38.2%"),
        ("oracle", "20.4–38.2%"),
        ("none", "more than those (figure not checked)"),
    ):
        out.add(
            f"KV slots that hold tokens, reserve={reserve} (host; {lengths[0]})",
            "CR",
            paper,
            useful(reserve, lengths[1]),
        )
    capacity(out, bench, quick)
    for width in (2, 4, 6):
        out.add(
            f"Memory saved by sharing, {width} samples (host)",
            "CE",
            "6.1–9.8%",
            f"{shared(SamplingParams(n=width, max_tokens=58, ignore_eos=True)):.1%}",
        )
    for width in (2, 4, 6):
        params = SamplingParams(beam_width=width, n=1, max_tokens=58, ignore_eos=True)
        out.add(f"Memory saved by sharing, {width} beams (host)", "CE", "37.6–55.2%", f"{shared(params):.1%}")
    for prefix, paper in ((80, "1.67×, its shorter prefix"), (341, "3.58×, its longer one")):
        out.add(
            f"Time saved by a shared prefix of {prefix} tokens",
            "CR",
            f"throughput {paper}",
            shared_prefix(bench, prefix, quick),
        )
    out.add(
        "Tensor parallelism under one block manager",
        "later",
        "one manager, a block table for all",
        "in headrace (--tensor-parallel-size), not measured by this table",
    )
    return out


def contiguous(bench: Bench) -> str:
    """Logits of a paged engine compared with one call over the whole sequence, by ==."""
    engine = bench.engine(max_num_batched_tokens=7, block_size=8, num_kv_blocks=64)
    kept: list[torch.Tensor] = []
    observe(engine.runner, "logits", lambda _, logits: kept.append(logits))
    prompt = [random.Random(3).randrange(2, bench.vocab_size) for _ in range(150)]
    tokens = run_jobs(engine, [Job(prompt, 40)]).tokens[1]
    ids = torch.tensor(prompt + tokens[:-1])
    rows = torch.arange(len(prompt) - 1, len(ids))
    context = DenseContext(bench.ops, bench.model.config, [len(ids)])
    dense = bench.model.forward(ids, packed_positions([len(ids)], bench.ops.device), context, rows)
    paged = torch.cat([row for row in kept if row.shape[0]])
    return "equal, every bit of the logits" if torch.equal(dense, paged) else "NOT equal"


def waste(quick: bool) -> str:
    """Held minus filled slots of single sequences, compared with the formula at every step."""
    worst = 0
    for length in random.Random(0).sample(range(1, 2000), 20 if quick else 100):
        engine = host_engine(256, prefix_caching=False)
        engine.scheduler.add(Request(1, list(range(length)), SamplingParams(max_tokens=40, ignore_eos=True)))
        while engine.has_work:
            engine.step()
            stats = engine.scheduler.stats
            if stats.num_running:
                wasted = stats.held_slots - stats.used_slots
                if wasted != -stats.used_slots % 16:
                    return f"NOT the formula: {wasted} of {stats.used_slots}"
                worst = max(worst, wasted)
    return f"equal to the formula at every step; at most {worst} slots"


def useful(reserve: str, lengths: list[tuple[int, int]]) -> str:
    """Filled over held slots, summed over a whole run at one budget, without shared prefixes."""
    engine = host_engine(1 + BUDGET_TOKENS // 16, max_len=2048, prefix_caching=False, reserve=reserve, max_num_seqs=256)
    run_jobs(engine, random_jobs(fit(lengths, 2048), 90))
    stats = engine.scheduler.stats
    return f"{stats.used_slot_steps / stats.held_slot_steps:.1%}"


def fit(lengths: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Lengths cut so that prompt and output fit a context."""
    return [(min(p, limit // 2), min(o, limit // 2 - 1)) for p, o in lengths]


def capacity(out: Table, bench: Bench, quick: bool) -> None:
    """Requests per second at one KV budget, compared with each reservation."""
    source, lengths = conversation_lengths(24 if quick else 96, 0.125, seed=1)
    jobs = random_jobs(fit(lengths, 1024), bench.vocab_size)

    def seconds(reserve: str) -> float:
        engine = bench.engine(
            num_kv_blocks=1 + 4096 // 16, max_model_len=1024, reserve=reserve, max_num_seqs=64, prefix_caching=False
        )
        return run_jobs(engine, jobs).seconds

    seconds("none")
    paged = seconds("none")
    for reserve, paper in (
        ("max", "2.7–8× over Orca (Max)"),
        ("pow2", "(between the two)"),
        ("oracle", "1.7–2.7× over Orca (Oracle)"),
    ):
        out.add(
            f"Requests per second at one KV budget, against reserve={reserve} ({source})",
            "CR",
            paper,
            f"{seconds(reserve) / paged:.2f}×",
        )


def shared(params: SamplingParams) -> float:
    """Mean over steps of 1 − physical / logical blocks, for 8 short instructions: 8–30 tokens in, 58 out."""
    engine = host_engine(4096, max_num_seqs=128, max_num_batched_tokens=2048)
    draw = random.Random(0)
    ids = itertools.count(1)
    searches = []
    for _ in range(8):
        prompt = [draw.randrange(90) for _ in range(draw.randrange(8, 31))]
        first = Request(next(ids), prompt, params)
        if params.beam_width:
            searches.append(BeamSearch(engine.scheduler, first, lambda: next(ids)))
            continue
        for request in (first, *(first.sibling(next(ids), i) for i in range(1, params.n))):
            engine.scheduler.add(request)
    logical = physical = 0
    while engine.has_work:
        for update in engine.step():
            for search in searches:
                if search.group_id == update.group_id:
                    search.take(update)
        stats = engine.scheduler.stats
        logical, physical = logical + stats.held_slots // 16, physical + stats.physical_blocks
    return 1 - physical / logical


def shared_prefix(bench: Bench, prefix: int, quick: bool) -> str:
    """Time without the prefix cache over time with it, for short prompts after one prefix."""
    jobs = random_jobs([(24, 16)] * (16 if quick else 48), bench.vocab_size, prefix=prefix)
    cold = run_jobs(bench.engine(prefix_caching=False, num_kv_blocks=4096), jobs).seconds
    warm = run_jobs(bench.engine(num_kv_blocks=4096), jobs).seconds
    return f"{cold / warm:.2f}×"
