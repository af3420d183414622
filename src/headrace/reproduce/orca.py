"""Orca (Yu et al., OSDI 2022): iteration-level scheduling, selective batching, reservation that cannot deadlock."""

from __future__ import annotations

import random
import statistics

from headrace.bench.load import Outcome, conversation_lengths, random_jobs, run_jobs
from headrace.reproduce.paged import fit
from headrace.reproduce.setup import ON, Bench, host_engine
from headrace.reproduce.table import Table

__all__ = ["table"]


def table(quick: bool = False) -> Table:
    """The paper's rows, measured now."""
    out = Table("Orca: A Distributed Serving System for Transformer-Based Generative Models", ON)
    bench = Bench()
    source, lengths = conversation_lengths(24 if quick else 96, 0.125, seed=2)
    jobs = random_jobs(fit(lengths, 1024), bench.vocab_size)

    def run(batching: str, seats: int) -> Outcome:
        return run_jobs(
            bench.engine(batching=batching, num_kv_blocks=4096, max_model_len=1024, max_num_seqs=seats), jobs
        )

    run("orca", 16)
    alone = run("static", 1)
    by_request, by_step = run("static", 16), run("orca", 16)
    same = sum(by_step.tokens[i] == by_request.tokens[i] == alone.tokens[i] for i in alone.tokens)
    out.add(
        "Tokens of iteration-level against request-level batching and one at a time",
        "CE",
        "the same requests",
        f"{same}/{len(jobs)} requests equal",
    )
    out.add("Reservation cannot deadlock (host)", "CE", "never", deadlocks(20 if quick else 200))
    for seats in (4, 16):
        ours, theirs = run("orca", seats), run("static", seats)
        latency = median_latency(theirs) / median_latency(ours)
        out.add(
            f"Throughput against request-level batching, batch {seats} ({source})",
            "CR",
            "more at equal latency, by model and load",
            f"{theirs.seconds / ours.seconds:.2f}×; median latency {latency:.2f}× less",
        )
    out.add("36.9× over FasterTransformer", "X", "36.9×", "not claimed: another machine, model and baseline")
    out.add("n_workers batches in flight through a pipeline", "later", "one a stage", "not in headrace yet")
    out.add("Separate control and data channels", "later", "control skips the GPU path", "not in headrace yet")
    return out


def median_latency(outcome: Outcome) -> float:
    """Median seconds from the start to a request's last token."""
    return statistics.median(times[-1] for times in outcome.times.values())


def deadlocks(count: int) -> str:
    """Run random loads in pools little larger than one request, under every reservation: all must end."""
    draw = random.Random(0)
    for _ in range(count):
        reserve = draw.choice(("none", "max", "pow2", "oracle"))
        limit = draw.choice((64, 128, 256))
        engine = host_engine(2 + limit // 16, max_len=limit, reserve=reserve, batching="orca", max_num_seqs=8)
        lengths = [(draw.randrange(1, limit // 2), draw.randrange(1, limit // 2)) for _ in range(12)]
        outcome = run_jobs(engine, random_jobs(lengths, 90, seed=draw.randrange(10**6)))
        if [len(outcome.tokens[i]) for i in range(1, 13)] != [o for _, o in lengths]:
            return f"a load under reserve={reserve} did not end"
    return f"{count} of {count} loads in tight pools ended"
