"""The CPU kernels alone and under a model, beside torch and the machine's own rates.

    .venv/bin/python bench/kernel_rates.py [--rounds 5] [--threads 2] [--only products,rows,…]

products: GFLOP/s of our linear and torch's fp32 one.   rows: a pass over cold bf16 weights by 1 to 16 rows.
sums: what chunks and virtual shards cost against one chain.   attention: prefill's GFLOP/s and a decode's read rate.
depth: a decode at 8192 tokens against 128.   host: what of a step is outside the kernels.
Prints medians; writes docs/results/kernels.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from headrace import LLM, SamplingParams  # before torch: its thread pool starts with the kernels' settings
from headrace.bench.measure import in_turn, rates, seconds, write_results
from headrace.bench.models import SHAPES, random_checkpoint
from headrace.kernels.cpu import program, serving
from headrace.kernels.cpu.product import product
from headrace.kernels.cpu.views import bounds_chunks
from headrace.kernels.load import load_ops
from headrace.kernels.ops import AttentionMeta
from headrace.kernels.panels import Panels

import numpy as np  # isort: skip
import torch  # isort: skip

SHAPES_NK = ((2048, 768), (768, 768), (768, 2048), (512, 128), (128, 512))
HEADS = ((12, 4, 64), (12, 12, 64), (16, 8, 128))
"""(heads, kv heads, elements of a head)"""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Results = dict[str, Any]


class Bench:
    """The operations and the settings of a run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.rounds, self.threads = arguments.rounds, arguments.threads
        self.ops = load_ops("cpu", threads=self.threads)
        torch.set_num_threads(self.threads)
        self.read = 0.0
        """Bytes that the machine reads in a second."""

    def medians(self, *sides: Callable[[], object], repeats: int = 1) -> list[float]:
        """Each side's median seconds of a call, measured in turn."""

        def side(work: Callable[[], object]) -> Callable[[], float]:
            return lambda: seconds(lambda: [work() for _ in range(repeats)]) / repeats

        return [statistics.median(found) for found in in_turn([side(work) for work in sides], self.rounds)]

    # ---- products ------------------------------------------------------------------------------------------

    def products(self) -> Results:
        found: Results = {}
        for outputs, inputs in SHAPES_NK:
            for rows in (64, 256, 1024):
                x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
                panels = Panels(outputs, inputs, torch.float32, x.device)
                panels.put(0, w)
                work, repeats = 2 * rows * outputs * inputs, max(1, 200_000_000 // (rows * outputs * inputs))
                ours, as_rows, theirs = (
                    work / s / 1e9
                    for s in self.medians(
                        lambda x=x, p=panels: self.ops.linear(x, p),  # type: ignore[misc]
                        lambda x=x, w=w: self.ops.linear(x, w),  # type: ignore[misc]
                        lambda x=x, w=w: torch.nn.functional.linear(x, w),  # type: ignore[misc]
                        repeats=repeats,
                    )
                )
                found[f"{outputs}x{inputs} of {rows}"] = {"panels": ours, "rows": as_rows, "torch": theirs}
                print(
                    f"{outputs:5} × {inputs:4} of {rows:4} rows: {ours:6.1f} panels  {as_rows:6.1f} rows"
                    f"  {theirs:6.1f} torch  GFLOP/s  {ours / theirs:.2f}×"
                )
        return found

    def rows(self) -> Results:
        """Passes over 150 MB of panels, which no cache holds."""
        weights = [Panels(4096, 768, torch.bfloat16, torch.device("cpu")) for _ in range(24)]
        for weight in weights:
            weight.tensor.normal_()
        counts, size = (1, 2, 4, 8, 16), sum(weight.tensor.nbytes for weight in weights)
        inputs = [torch.randn(count, 768) for count in counts]
        times = self.medians(*(lambda x=x: [self.ops.linear(x, w) for w in weights] for x in inputs))  # type: ignore[misc]
        for count, took in zip(counts, times):
            rate = f"{took * 1e3:6.2f} ms a pass, {size / took / 1e9:5.1f} GB/s"
            print(f"{count:3} cold rows: {rate}, {took / times[0]:.2f}×")
        return {str(count): {"seconds": took, "gb_s": size / took / 1e9} for count, took in zip(counts, times)}

    def sums(self) -> Results:
        """The law's chunks and shards against a single chain, for the widest sums of each model."""
        found: Results = {}
        for name, outputs, inputs, shards in (
            ("small, out", 768, 768, 4),
            ("small, down", 768, 2048, 4),
            ("12.6M, down", 384, 1024, 2),
            ("1M, out", 128, 128, 4),
            ("1M, down", 128, 512, 4),
        ):
            sizes = 512 * inputs, outputs * inputs, 512 * outputs
            x, w, y = (np.random.randn(size).astype(np.float32) for size in sizes)

            def multiply(chunks: Any, levels: int, x: Any = x, w: Any = w, y: Any = y, k: int = inputs) -> None:
                bias, outputs = np.empty(0, np.float32), y.size // 512
                product(x, 1, k, w, 1, k, 16 * k, bias, y, 512, outputs, False, chunks, levels, self.threads)

            law = bounds_chunks(tuple(range(0, inputs + 1, inputs // shards)), inputs)
            chain = np.array([[0, 0, inputs, 0, 0, 0]]), 1
            repeats = max(1, 400_000_000 // (512 * outputs * inputs))
            ours, single = self.medians(
                lambda m=multiply, c=law: m(*c),  # type: ignore[misc]
                lambda m=multiply, c=chain: m(*c),  # type: ignore[misc]
                repeats=repeats,
            )
            found[name] = {"law": ours, "one_chain": single}
            more = f"{(ours / single - 1) * 100:+5.1f}% against one chain"
            print(f"{name:12} {outputs:4} × {inputs:4} in {shards} shards: {more}")
        return found

    # ---- attention -----------------------------------------------------------------------------------------

    def attention(self) -> Results:
        found: Results = {}
        for heads, kv_heads, dim in HEADS:
            for name, dtype in DTYPES.items():
                found[f"{heads}/{kv_heads} of {dim}, {name}"] = self._attention(heads, kv_heads, dim, dtype, name)
        return found

    def _attention(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, name: str) -> Results:
        scale, length, depth = dim**-0.5, 1024, 8192
        q, blocks, meta = cache(1, length, length, heads, kv_heads, dim, dtype, 1)
        k, v = (torch.randn(1, heads, length, dim) for _ in range(2))
        ours, theirs = self.medians(
            lambda: self.ops.attention(q, blocks, 0, meta, scale),
            lambda: torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True),
            repeats=3,
        )
        work = 2 * heads * dim * length * (length + 1)
        layers = 12
        q1, deep, meta1 = cache(1, depth, 1, heads, kv_heads, dim, dtype, layers)
        turn = iter(range(10**9))
        [took] = self.medians(
            lambda: self.ops.attention(q1, deep, next(turn) % layers, meta1, scale), repeats=2 * layers
        )
        read = 2 * depth * kv_heads * dim * dtype.itemsize / took
        print(
            f"{heads:2}/{kv_heads:2} heads of {dim:3}, {name}: prefill {work / ours / 1e9:6.1f} GFLOP/s"
            f" (torch {work / theirs / 1e9:6.1f}), decode at {depth} {read / 1e9:5.1f} GB/s, {read / self.read:4.0%}"
        )
        return {"prefill": work / ours / 1e9, "torch": work / theirs / 1e9, "decode_gb_s": read / 1e9}

    # ---- a model -------------------------------------------------------------------------------------------

    def depth(self) -> Results:
        """Time of a token after 128 and 8192 others; what it takes longer over what its keys and values take."""
        config = replace(SHAPES["small"], max_position_embeddings=8448)
        folder = random_checkpoint(config, Path("runs/bench/small-8k"))
        found: Results = {}
        for name in DTYPES:
            llm = model(folder, self.threads, kv_cache_dtype=name, max_model_len=8448)
            prompts = {length: numbers(length) for length in (128, 8192)}
            for prompt in prompts.values():
                generate(llm, [prompt], 1)  # from now on it is cached: what is timed is decoding
            short, long = (
                statistics.median(step_seconds(llm, lambda p=prompt: [p], 32) for _ in range(self.rounds))  # type: ignore[misc]
                for prompt in prompts.values()
            )
            size = 2 * 8064 * config.num_layers * config.num_kv_heads * config.head_dim * DTYPES[name].itemsize
            ratio = (long - short) / (size / self.read)
            found[name] = {"short": short, "long": long, "kv_bytes": size, "ratio": ratio}
            print(
                f"{name} cache: {short * 1e3:.2f} ms at 128, {long * 1e3:.2f} ms at 8192: {ratio:.2f}× its bytes' time"
            )
        return found

    def host(self) -> Results:
        """The share of a step in which no kernel of the model runs."""
        llm = model(random_checkpoint("small", Path("runs/bench/small")), self.threads)
        found: Results = {}
        for requests in (1, 16, 64):
            shares = []
            for _ in range(self.rounds):
                with timed_kernels() as spent:
                    whole = step_seconds(llm, lambda n=requests: [numbers(32) for _ in range(n)], 33, spent)  # type: ignore[misc]
                shares.append(1 - spent[-1] / whole)
            found[str(requests)] = statistics.median(shares)
            print(f"{requests:3} requests: the host has {found[str(requests)]:5.1%} of a step of {whole * 1e3:.2f} ms")
        return found


def cache(
    sequences: int, context: int, rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, layers: int
) -> tuple[torch.Tensor, torch.Tensor, AttentionMeta]:
    """(q, blocks, meta): the last `rows` rows of sequences whose blocks lie anywhere."""
    count = -(-context // 16)
    blocks = torch.randn(sequences * count + 1, layers, 2, kv_heads, 16, dim).to(dtype)
    order = torch.randperm(sequences * count) + 1
    meta = AttentionMeta(
        order.view(sequences, count).int(),
        torch.arange(0, (sequences + 1) * rows, rows, dtype=torch.int32),
        torch.full((sequences,), context, dtype=torch.int32),
        torch.zeros(sequences * rows, dtype=torch.int32),
        rows,
        context,
    )
    return torch.randn(sequences * rows, heads, dim), blocks, meta


def model(folder: Path, threads: int, **options: Any) -> LLM:
    llm = LLM(str(folder), threads=threads, kv_cache_memory="1GiB", max_num_seqs=64, **options)
    generate(llm, [numbers(16)], 4)
    return llm


def numbers(length: int) -> list[int]:
    """Return a random prompt."""
    return [random.randrange(300, 31000) for _ in range(length)]


def generate(llm: LLM, prompts: Sequence[list[int]], outputs: int) -> None:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=outputs)
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)


def step_seconds(
    llm: LLM, prompts: Callable[[], list[list[int]]], outputs: int, spent: list[float] | None = None
) -> float:
    """Seconds of a decode step: of `outputs` tokens less what one takes. `spent` then ends with its kernels' part."""
    before = 0.0 if spent is None else spent[0]
    one = seconds(lambda: generate(llm, prompts(), 1))
    between = 0.0 if spent is None else spent[0]
    many = seconds(lambda: generate(llm, prompts(), outputs))
    if spent is not None:
        spent.append(((spent[0] - between) - (between - before)) / (outputs - 1))
    return (many - one) / (outputs - 1)


@contextmanager
def timed_kernels() -> Iterator[list[float]]:
    """Count the seconds in the blocks and in products, in the first element."""
    spent = [0.0]

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                spent[0] += time.perf_counter() - start

        return call

    with ExitStack() as stack:
        for module, name in ((program, "run_layers"), (serving, "product")):
            stack.enter_context(mock.patch.object(module, name, timed(getattr(module, name))))
        yield spent


PARTS = ("products", "rows", "sums", "attention", "depth", "host")


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    bench, results, machine_rates = Bench(arguments), {}, []
    for part in parts:
        machine_rates.append(rates(arguments.threads))
        bench.read = machine_rates[-1]["read_gb_s"] * 1e9
        print(f"\n{part} ({bench.read / 1e9:.1f} GB/s, {machine_rates[-1]['matrix_gflop_s']:.0f} GFLOP/s)", flush=True)
        results[part] = getattr(bench, part)()
    machine_rates.append(rates(arguments.threads))
    if parts == list(PARTS):
        written = write_results("kernels", {"threads": arguments.threads, "rates": machine_rates, **results})
        print(f"\nwrote {written}")


if __name__ == "__main__":
    main()
