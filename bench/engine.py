"""The engine beside its peers, in interleaved pairs on the same weights.

    .venv/bin/python bench/engine.py [--pairs 5] [--only dec1,dec16,…] [--llama DIR --gguf FILE]

Model "small": random Llama, 100M parameters, bf16 checkpoint. Prints medians, ratios with their range, and the
machine's bandwidth and matrix rate before and after, losses too; writes docs/results/engine.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from headrace.bench.load import conversation_lengths
from headrace.bench.measure import Pairs, interleave, rates, write_results
from headrace.bench.models import SHAPES, random_checkpoint
from headrace.reproduce.setup import host_engine
from workers import Side

SMALL = SHAPES["small"]
DRAW = random.Random(7)
KV_BYTES = 2 * SMALL.num_layers * SMALL.num_kv_heads * SMALL.head_dim * 4
HEADS = SMALL.num_heads * SMALL.head_dim
LAYER_WEIGHTS = (
    SMALL.hidden_size * (2 * HEADS + 2 * SMALL.num_kv_heads * SMALL.head_dim)
    + 3 * SMALL.hidden_size * SMALL.intermediate_size
)
HEAD_WEIGHTS = SMALL.vocab_size * SMALL.hidden_size


def prompt(length: int) -> list[int]:
    return [DRAW.randrange(31000) for _ in range(length)]


class Bench:
    """The sides of a run, and its results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.pairs = arguments.pairs
        self.threads = arguments.threads
        self.llama, self.gguf = arguments.llama, arguments.gguf
        self.checkpoint = random_checkpoint("small", Path("runs/bench/small"))
        self._sides: dict[str, Side] = {}
        self._round = 0
        self.results: dict[str, Any] = {}

    def side(self, kind: str) -> Side:
        if kind not in self._sides:
            self._sides[kind] = Side(kind, self.checkpoint, self.threads)
        return self._sides[kind]

    def fresh(self) -> int:
        """A new shift of all token ids, so that runs have different prompts."""
        self._round += 1
        return self._round

    def record(self, name: str, text: str, **figures: Any) -> None:
        self.results[name] = {"text": text, **figures}
        print(f"{name:28} {text}", flush=True)

    def compare(self, name: str, unit: str, ours: Callable[[], float], theirs: Callable[[], float], peer: str) -> Pairs:
        """Measure pairs, print and store them. Figures are rates: more is better."""
        pairs = interleave(ours, theirs, self.pairs)
        self.record(
            name,
            f"{statistics.median(pairs.ours):8.1f} {unit}   {peer} {statistics.median(pairs.theirs):8.1f}"
            f"   {pairs.verdict}",
            pairs=pairs,
            unit=unit,
            peer=peer,
        )
        return pairs

    def close(self) -> None:
        for side in self._sides.values():
            side.close()


def decode_rate(answer: dict[str, Any]) -> float:
    """Tokens per second between the first and the last token of one request."""
    times = answer["times"][0]
    return (len(times) - 1) / (times[-1] - times[0])


def dec1(b: Bench) -> None:
    """Batch-1 decode, 128 tokens behind 128."""
    job = [(prompt(128), 128)]
    ours, peer = b.side("headrace"), b.side("transformers")

    def theirs() -> float:
        answer = peer.run(job, b.fresh())
        return 127 / (answer["seconds"] - answer["first"])

    before = rates(b.threads)["read_gb_s"]
    pairs = b.compare(
        "decode, batch 1", "tok/s", lambda: decode_rate(ours.run(job, b.fresh())), theirs, "transformers fp32"
    )
    after = rates(b.threads)["read_gb_s"]
    step_bytes = 2 * (SMALL.num_layers * LAYER_WEIGHTS + HEAD_WEIGHTS) + KV_BYTES * (128 + 64)
    share = statistics.median(pairs.ours) * step_bytes / 1e9 / ((before + after) / 2)
    b.record(
        "decode, share of bandwidth",
        f"{share:.0%} of {before:.1f}–{after:.1f} GB/s; {step_bytes / 1e6:.0f} MB a token",
        share=share,
        before=before,
        after=after,
        step_bytes=step_bytes,
    )
    llama(
        b,
        "decode, batch 1, llama.cpp",
        ["-p", "0", "-n", "128", "-d", "128"],
        "tg128",
        lambda: decode_rate(ours.run(job, b.fresh())),
    )


def dec16(b: Bench) -> None:
    """16 requests of 128 in, 128 out; the time includes prefill."""
    jobs = [(prompt(128), 128) for _ in range(16)]
    b.compare(
        "16 at once, 128 in 128 out",
        "tok/s",
        lambda: 16 * 128 / b.side("headrace").run(jobs, b.fresh())["seconds"],
        lambda: 16 * 128 / b.side("transformers").run(jobs, b.fresh())["seconds"],
        "transformers fp32",
    )
    if b.llama:

        def batched() -> float:
            out = subprocess.run(
                [
                    f"{b.llama}/llama-batched-bench",
                    "-m",
                    b.gguf,
                    "-t",
                    str(b.threads),
                    "-c",
                    "8192",
                    "-b",
                    "2048",
                    "-ub",
                    "512",
                    "-npp",
                    "128",
                    "-ntg",
                    "128",
                    "-npl",
                    "16",
                ],
                capture_output=True,
                text=True,
                check=True,
            )
            row = [line for line in out.stdout.splitlines() if re.match(r"\|\s+128 \|", line)][-1].split("|")
            return 16 * 128 / float(row[9])

        b.compare(
            "16 at once, llama.cpp",
            "tok/s",
            lambda: 16 * 128 / b.side("headrace").run(jobs, b.fresh())["seconds"],
            batched,
            "llama.cpp",
        )


def prefill(b: Bench) -> None:
    """1024-token prompt to its first token."""
    job = [(prompt(1024), 1)]
    ours = b.side("headrace")
    before = rates(b.threads)["matrix_gflop_s"]
    pairs = b.compare(
        "prefill, 1024 tokens",
        "tok/s",
        lambda: 1024 / ours.run(job, b.fresh(), max_num_batched_tokens=1024)["times"][0][0],
        lambda: 1024 / b.side("transformers").run(job, b.fresh())["seconds"],
        "transformers fp32",
    )
    after = rates(b.threads)["matrix_gflop_s"]
    flops = 2 * 1024 * SMALL.num_layers * LAYER_WEIGHTS + 2 * HEAD_WEIGHTS + 2 * 1024 * 1024 * HEADS * SMALL.num_layers
    share = statistics.median(pairs.ours) / 1024 * flops / 1e9 / ((before + after) / 2)
    b.record(
        "prefill, share of matrix rate",
        f"{share:.0%} of {before:.0f}–{after:.0f} GFLOP/s (torch fp32, 2048³)",
        share=share,
        before=before,
        after=after,
        flops=flops,
    )
    llama(
        b,
        "prefill, llama.cpp",
        ["-p", "1024", "-n", "0"],
        "pp1024",
        lambda: 1024 / ours.run(job, b.fresh(), max_num_batched_tokens=1024)["times"][0][0],
    )


def llama(b: Bench, name: str, flags: list[str], test: str, ours: Callable[[], float]) -> None:
    """A figure of llama-bench, where it is installed; it does not count loading the model."""
    if not b.llama:
        return

    def theirs() -> float:
        out = subprocess.run(
            [f"{b.llama}/llama-bench", "-m", b.gguf, "-t", str(b.threads), "-r", "1", "-o", "json", *flags],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(out.stdout)[0]["avg_ts"]

    b.compare(name, "tok/s", ours, theirs, f"llama.cpp {Path(b.gguf).stem}")


def shared(b: Bench) -> None:
    """32 requests, 8773 tokens in and 2145 out, after one prefix of 512 tokens: with the cache and without."""
    draw = random.Random(0)
    prefix = prompt(512)
    jobs = [(prefix + prompt(draw.randrange(32, 513)), draw.randrange(16, 129)) for _ in range(32)]
    ours = b.side("headrace")
    outputs = sum(out for _, out in jobs)
    pairs = b.compare(
        "shared prefix, with cache",
        "tok/s",
        lambda: outputs / ours.run(jobs, b.fresh())["seconds"],
        lambda: outputs / ours.run(jobs, b.fresh(), prefix_caching=False)["seconds"],
        "without",
    )
    b.record("shared prefix, time", f"{1 / pairs.ratio:.2f}× the time without the cache", ratio=1 / pairs.ratio)


def iteration(b: Bench) -> None:
    """Iteration-level compared with request-level batching, on scaled conversation lengths."""
    source, lengths = conversation_lengths(48, 0.125)
    jobs = [(prompt(min(p, 1000)), min(o, 200)) for p, o in lengths]
    ours, outputs = b.side("headrace"), sum(min(o, 200) for _, o in lengths)
    b.compare(
        "iteration-level batching",
        "tok/s",
        lambda: outputs / ours.run(jobs, b.fresh(), max_num_seqs=16)["seconds"],
        lambda: outputs / ours.run(jobs, b.fresh(), max_num_seqs=16, batching="static")["seconds"],
        "static",
    )
    b.results["iteration-level batching"]["lengths"] = source


def stall(b: Bench) -> None:
    """Worst time between tokens of 8 requests while a 2000-token prompt arrives."""
    jobs: list[Any] = [(prompt(32), 100) for _ in range(8)]
    jobs.append((prompt(2000), 2, 20))
    ours = b.side("headrace")

    def worst(batching: str) -> float:
        answer = ours.run(jobs, b.fresh(), batching=batching, max_num_batched_tokens=128)
        return max(y - x for times in answer["times"][:8] for x, y in zip(times, times[1:]))

    pairs = interleave(lambda: worst("sarathi"), lambda: worst("orca"), b.pairs)
    b.record(
        "worst time between tokens",
        f"{statistics.median(pairs.ours) * 1e3:.0f} ms   orca "
        f"{statistics.median(pairs.theirs) * 1e3:.0f} ms   {pairs.verdict} (less is better)",
        pairs=pairs,
        unit="s",
    )


def waste(b: Bench) -> None:
    """KV slots with tokens, at one budget, by reservation. Host logic, no model."""
    from headrace.reproduce.paged import useful

    source, lengths = conversation_lengths(300, 0.25)
    found = {reserve: useful(reserve, lengths) for reserve in ("none", "oracle", "pow2", "max")}
    b.record("KV slots in use", "   ".join(f"{k} {v}" for k, v in found.items()), lengths=source, **found)


def host(b: Bench) -> None:
    """Steps per second of the loop alone: 64 running requests, a null runner."""
    from headrace.bench.load import Job
    from headrace.engine.schedule.request import Request
    from headrace.engine.schedule.sampling import SamplingParams

    def steps() -> float:
        engine = host_engine(8192, max_num_seqs=64, max_num_batched_tokens=4096)
        for i in range(64):
            job = Job(prompt(64), 600)
            engine.scheduler.add(
                Request(i + 1, job.prompt, SamplingParams(temperature=0.0, max_tokens=600, ignore_eos=True))
            )
        for _ in range(20):
            engine.step()
        start = time.perf_counter()
        for _ in range(500):
            engine.step()
        return 500 / (time.perf_counter() - start)

    steps()
    found = [steps() for _ in range(b.pairs)]
    b.record(
        "host loop, 64 running",
        f"{statistics.median(found):.0f} steps/s ({min(found):.0f}–{max(found):.0f})",
        steps=found,
    )


def bits(b: Bench) -> None:
    """The cost of the same bits: our kernels compared with torch's linear and SDPA in the same slots."""
    ours, theirs = b.side("headrace"), b.side("torch-slots")
    one, many, long = [(prompt(128), 64)], [(prompt(128), 64) for _ in range(16)], [(prompt(1024), 1)]
    b.compare(
        "same bits, decode 1",
        "tok/s",
        lambda: decode_rate(ours.run(one, b.fresh())),
        lambda: decode_rate(theirs.run(one, b.fresh())),
        "torch slots fp32",
    )
    b.compare(
        "same bits, 16 at once",
        "tok/s",
        lambda: 1024 / ours.run(many, b.fresh())["seconds"],
        lambda: 1024 / theirs.run(many, b.fresh())["seconds"],
        "torch slots fp32",
    )
    b.compare(
        "same bits, prefill 1024",
        "tok/s",
        lambda: 1024 / ours.run(long, b.fresh(), max_num_batched_tokens=1024)["seconds"],
        lambda: 1024 / theirs.run(long, b.fresh(), max_num_batched_tokens=1024)["seconds"],
        "torch slots fp32",
    )


SECTIONS = {f.__name__: f for f in (host, waste, dec1, dec16, prefill, shared, iteration, stall, bits)}


def main() -> None:
    """Run the chosen sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--llama", help="the folder of llama-bench and llama-batched-bench")
    parser.add_argument("--name", default="engine", help="name of the file in docs/results")
    parser.add_argument("--gguf", help="the same model as a GGUF file")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    before = rates(arguments.threads)
    print(f"machine before: {before['read_gb_s']:.1f} GB/s read, {before['matrix_gflop_s']:.0f} GFLOP/s fp32")
    try:
        for name in arguments.only.split(","):
            SECTIONS[name](bench)
    finally:
        bench.close()
    after = rates(arguments.threads)
    print(f"machine after:  {after['read_gb_s']:.1f} GB/s read, {after['matrix_gflop_s']:.0f} GFLOP/s fp32")
    command = " ".join(["bench/engine.py", *sys.argv[1:]])
    found = {"command": command, "before": before, "after": after, "results": bench.results}
    path = write_results(arguments.name, found)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
