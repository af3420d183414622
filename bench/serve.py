"""The server beside the engine under it, and beside its peers, in interleaved runs on the same weights.

    .venv/bin/python bench/serve.py [--pairs 5] [--only overhead,startup,…] [--llama-server PATH --gguf FILE]
                                    [--vllm "vllm serve … --port {port}"] [--trace FILE] [--quick]

Model "small": random Llama, 100M parameters, bf16 checkpoint. Prints medians and ratios; writes
docs/results/serve.json. It prints losses as it prints wins. --quick tries the script; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from headrace.bench.measure import interleave, rates, write_results
from headrace.bench.models import SHAPES, random_checkpoint
from headrace.bench.serving import RequestRow, find_model, make_calls, run_calls
from headrace.bench.summary import spread, summarise
from headrace.bench.traces import Prompts, TraceRow, read_trace, schedule, synthetic
from serve_sides import RunningServer, Worker, headrace, peer

STREAMS, PROMPT, OUTPUT = 32, 128, 128
OPEN_STREAMS = 256
OVERLOAD, OVERLOAD_RATE, MAX_QUEUE = 3000, 300.0, 64
VOCAB = 31000
LIMIT = 1800.0
PATHS = ("/health", "/metrics")
FIGURES = ("ttft_ms", "gap_ms", "tpot_ms", "latency_ms")


class Bench:
    """The arguments of a run, and its results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.pairs = arguments.pairs
        self.quick = arguments.quick
        self.checkpoint = random_checkpoint("small", Path("runs/bench/small"))
        self.results: dict[str, Any] = {}
        self._round = 0

    def fresh(self) -> int:
        """A new seed, so that no run finds another run's prompts in a cache."""
        self._round += 1
        return self._round

    def record(self, name: str, text: str, **figures: Any) -> None:
        self.results[name] = {"text": text, **figures}
        print(f"{name:28} {text}", flush=True)

    def serve(self, *flags: str, seqs: int = 64, cache: Path | None = None) -> Any:
        """Our server with the options that all sides share."""
        return headrace(
            self.checkpoint,
            "--threads",
            str(self.arguments.threads),
            "--kv-cache-memory",
            self.arguments.kv_cache_memory,
            "--max-num-seqs",
            str(seqs),
            *flags,
            cache=cache,
        )


def at_once(
    server: RunningServer, count: int, prompt: int, output: int, seed: int, rate: float = 1e6, limit: float = LIMIT
) -> list[RequestRow]:
    """`count` requests, all at once without a rate."""
    plan = [(i / rate, TraceRow(0.0, prompt, output)) for i in range(count)]
    calls = make_calls(plan, Prompts(VOCAB, seed), find_model(server.url).name)
    return asyncio.run(run_calls(server.url, calls, limit))


def whole(rows: list[RequestRow]) -> list[RequestRow]:
    """The rows; ends the benchmark if one failed, as figures with failures are not comparable."""
    failed = [f"{row.failure}: {row.message}" for row in rows if row.failure]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} requests failed: {failed[0]}")
    return rows


def overhead(b: Bench) -> None:
    """Output tokens a second of streams over HTTP, and of the same requests through LLM.generate."""
    count, prompt, output = (4, 16, 8) if b.quick else (STREAMS, PROMPT, OUTPUT)
    options = {"threads": b.arguments.threads, "kv_cache_memory": b.arguments.kv_cache_memory, "max_num_seqs": 64}
    worker = Worker("llm", str(b.checkpoint), json.dumps(options))
    try:
        with b.serve() as server:

            def ours() -> float:
                rows = whole(at_once(server, count, prompt, output, b.fresh()))
                return sum(row.output_tokens for row in rows) / max(row.end or 0.0 for row in rows)

            def generate() -> float:
                prompts, row = Prompts(VOCAB, b.fresh()), TraceRow(0.0, prompt, output)
                answer = worker.run({"prompts": [prompts.make(i, row) for i in range(count)], "output": output})
                return answer["tokens"] / answer["seconds"]

            pairs = interleave(ours, generate, b.pairs)
    finally:
        worker.close()
    b.record(
        f"{count} streams over HTTP",
        f"{statistics.median(pairs.ours):8.1f} tok/s   LLM.generate {statistics.median(pairs.theirs):8.1f}"
        f"   {pairs.verdict}",
        pairs=pairs,
        unit="tok/s",
        streams=count,
        prompt=prompt,
        output=output,
    )


def startup(b: Bench) -> None:
    """Seconds from the start of the process until it is ready for requests."""

    def seconds(cache: Path | None) -> float:
        with b.serve(cache=cache) as server:
            return server.seconds

    seconds(None)  # now the kernels are compiled
    warm = [seconds(None) for _ in range(b.pairs)]
    b.record(
        "start, kernels cached", f"{statistics.median(warm):.1f} s ({min(warm):.1f}–{max(warm):.1f})", seconds=warm
    )
    cold = []
    for _ in range(1 if b.quick else min(3, b.pairs)):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(seconds(Path(folder)))
    b.record(
        "start, kernels compiled", f"{statistics.median(cold):.1f} s ({min(cold):.1f}–{max(cold):.1f})", seconds=cold
    )


def answers(b: Bench) -> None:
    """Latencies of /health and /metrics with many open streams, and with none."""
    count, output = (16, 8) if b.quick else (OPEN_STREAMS, 64)
    with b.serve(seqs=count) as server, contextlib.ExitStack() as stack:
        prober = Worker("probe", server.url)
        stack.callback(prober.close)

        def probed(load: Callable[[], Any]) -> dict[str, list[float]]:
            prober.send({"paths": PATHS})
            load()
            return prober.run({"stop": True})["seconds"]

        whole(at_once(server, 2, 16, 4, b.fresh()))
        idle = probed(lambda: asyncio.run(asyncio.sleep(1.0 if b.quick else 10.0)))
        busy = probed(lambda: whole(at_once(server, count, 16, output, b.fresh())))
    for path in PATHS:
        parts = []
        for label, found in (("open", busy), ("idle", idle)):
            figures = spread(s * 1e3 for s in found[path])
            assert figures is not None
            parts.append(f"{label}: p99 {figures['p99']:.1f} ms, worst {figures['max']:.1f} ms of {len(found[path])}")
        b.record(f"{path}, {count} streams", "   ".join(parts), open=busy[path], idle=idle[path])


def trace(b: Bench) -> None:
    """The same requests at the same times to each server, in turn, each started anew."""
    a = b.arguments
    rows = read_trace(Path(a.trace)) if a.trace else synthetic(2000)
    duration = 4.0 if b.quick else a.duration
    plan = schedule(rows, a.rate, duration)
    longest = max(sum(Prompts(VOCAB, 0, a.scale).lengths(row)) for _, row in plan) + 8
    sides: dict[str, Callable[[], Any]] = {"headrace": lambda: b.serve(seqs=a.seqs)}
    if a.llama_server:
        command = shlex.join(
            [
                a.llama_server,
                "-m",
                a.gguf,
                "--port",
                "PORT",
                "-t",
                str(a.threads),
                "-np",
                str(a.seqs),
                "-c",
                str(longest * a.seqs),
            ]
        ).replace("PORT", "{port}")
        sides["llama.cpp"] = lambda: peer(command)
    if a.vllm:
        sides["vllm"] = lambda: peer(a.vllm)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(b.pairs):
        names = list(sides) if turn % 2 == 0 else list(reversed(sides))
        seed = b.fresh()
        for name in names:
            with sides[name]() as server:
                model = find_model(server.url).name
                at_once(server, 2, 16, 4, 10_000 + seed)
                calls = make_calls(plan, Prompts(VOCAB, seed, a.scale), model)
                done = asyncio.run(run_calls(server.url, calls, duration + a.grace))
            found[name].append(summarise(done, a.slo_ttft, a.slo_tpot))
    what = {
        "trace": Path(a.trace).name if a.trace else "made up",
        "rate": a.rate,
        "duration": duration,
        "scale": a.scale,
        "requests": len(plan),
        "seqs": a.seqs,
    }
    for name, runs in found.items():
        b.record(f"trace, {name}", _trace_line(runs), **what, runs=runs)
    for name in list(found)[1:]:
        b.record(f"trace, headrace / {name}", _ratios(found["headrace"], found[name]))


def _trace_line(runs: list[dict[str, Any]]) -> str:
    parts = [f"answered {sum(r['completed'] for r in runs)} of {sum(r['requests'] for r in runs)}"]
    for name in FIGURES:
        known = [r[name] for r in runs if r[name]]
        if known:
            middle = {k: statistics.median(r[k] for r in known) for k in ("p50", "p90", "p99")}
            parts.append(f"{name[:-3]} " + "/".join(f"{v:.0f}" for v in middle.values()) + " ms")
    parts.append(f"{statistics.median(r['output_tokens_per_second'] for r in runs):.1f} tok/s")
    parts.append(f"within limits {statistics.median(r['goodput']['share'] for r in runs):.0%}")
    late = max((r["client_late_ms"] or {"max": 0.0})["max"] for r in runs)
    return "  ".join(parts) + f"  (p50/p90/p99; generator at most {late:.0f} ms late)"


def _ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """One ratio per turn; less is better."""
    parts = []
    for name in FIGURES:
        for k in ("p50", "p99"):
            pairs = [x[name][k] / y[name][k] for x, y in zip(ours, theirs) if x[name] and y[name] and y[name][k]]
            if pairs:
                tie = ", tie" if min(pairs) <= 1 <= max(pairs) else ""
                low, high = min(pairs), max(pairs)
                parts.append(f"{name[:-3]} {k} {statistics.median(pairs):.2f}× ({low:.2f}–{high:.2f}{tie})")
    return "  ".join(parts) + "  (less is better)"


def memory(b: Bench) -> None:
    """Resident memory of the gateway under overload, when its queue refuses requests."""
    count, rate = (60, 200.0) if b.quick else (OVERLOAD, OVERLOAD_RATE)
    queue = 8 if b.quick else MAX_QUEUE
    with b.serve("--max-queue", str(queue), seqs=4 if b.quick else 16) as server:
        whole(at_once(server, 2, 16, 4, b.fresh()))
        resident = [server.resident_mib()]
        failures = []
        for _ in range(3):
            rows = at_once(server, count, 64, 16, b.fresh(), rate)
            failures.append(summarise(rows)["failures"] | {"answered": sum(row.failure is None for row in rows)})
            resident.append(server.resident_mib())
        peak = server.resident_mib(peak=True)
    b.record(
        f"gateway, {count} requests × 3",
        " → ".join(f"{m:.0f}" for m in resident)
        + f" MiB, peak {peak:.0f}   "
        + "; ".join(", ".join(f"{n} × {kind}" for kind, n in sorted(f.items())) for f in failures),
        resident_mib=resident,
        peak_mib=peak,
        outcomes=failures,
        max_queue=queue,
        rate=rate,
    )


SECTIONS = {f.__name__: f for f in (overhead, startup, answers, trace, memory)}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-cache-memory", default="1GiB")
    parser.add_argument("--only", default=",".join(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--trace", help="a trace file; without one, Poisson arrivals")
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--grace", type=float, default=60.0)
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--seqs", type=int, default=16, help="sequences at once in the trace section, on every side")
    parser.add_argument("--slo-ttft", type=float, default=1000.0, help="ms")
    parser.add_argument("--slo-tpot", type=float, default=100.0, help="ms")
    parser.add_argument("--llama-server", help="path of llama.cpp's server")
    parser.add_argument("--gguf", help="the same model as a GGUF file")
    parser.add_argument("--vllm", metavar="CMD", help="a command that serves the same model on {port}")
    parser.add_argument("--name", default="serve", help="name of the file in docs/results")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    arguments = parser.parse_args()
    if bool(arguments.llama_server) != bool(arguments.gguf):
        parser.error("--llama-server and --gguf go together")
    if unknown := set(arguments.only.split(",")) - SECTIONS.keys():
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(SECTIONS)}")
    return arguments


def main() -> None:
    """Run the chosen sections."""
    arguments = options()
    assert SHAPES["small"].vocab_size >= VOCAB
    bench = Bench(arguments)
    before = rates(arguments.threads)
    print(f"machine before: {before['read_gb_s']:.1f} GB/s read, {before['matrix_gflop_s']:.0f} GFLOP/s fp32")
    for name in arguments.only.split(","):
        SECTIONS[name](bench)
    after = rates(arguments.threads)
    print(f"machine after:  {after['read_gb_s']:.1f} GB/s read, {after['matrix_gflop_s']:.0f} GFLOP/s fp32")
    command = " ".join(["bench/serve.py", *(a if "/" not in a else Path(a).name for a in sys.argv[1:])])
    if arguments.quick:
        print("tried only: nothing written")
        return
    found = {"command": command, "before": before, "after": after, "results": bench.results}
    print(f"wrote {write_results(arguments.name, found)}")


if __name__ == "__main__":
    main()
