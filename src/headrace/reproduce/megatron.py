"""Megatron-LM (Shoeybi et al., 2019): collectives per layer, the same bits at every degree, modelled scaling."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from headrace.parallel.rendezvous import keep_store
from headrace.reproduce.megatron_rank import RATE, TIMEOUT, recipe
from headrace.reproduce.table import Table

__all__ = ["SETTINGS", "Machine", "run_ranks", "table"]

SETTINGS = {
    True: {"layers": 2, "width": 64, "steps": 3, "rows": 4, "seq_length": 256},
    False: {"layers": 2, "width": 128, "steps": 20, "rows": 4, "seq_length": 512},
}
"""By `quick`."""
LAYOUTS = ((1, 1), (2, 2), (4, 4), (2, 1), (4, 2))
"""(processes, tensor-parallel degree)"""

PUBLISHED = ((1536, 40, 1), (1920, 54, 2), (2304, 64, 4), (3072, 72, 8))
"""(hidden, layers, tensor-parallel degree) of the paper's scaling study, as recalled."""
WEAK, WITH_COPIES = (0.95, 0.82, 0.77), (0.96, 0.83, 0.79, 0.74)
V100 = 39e12
"""Operations per second of one V100, as the paper reports."""
BATCH, LENGTH, VOCABULARY, COPIES = 8, 1024, 51200, 64
ALL_REDUCES = 6
"""All-reduces per layer: 2 forward, 2 backward, 2 in recomputation."""

ResultsByLayout = dict[tuple[int, int], list[dict[str, Any]]]


def table(quick: bool = False) -> Table:
    """The paper's rows, measured now."""
    setting = SETTINGS[quick]
    model = recipe(setting).model
    out = Table(
        "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
        f"a Llama of {model.num_layers} layers of {model.hidden_size}, {model.shards} virtual shards, CPU "
        "kernels, run in 1, 2 and 4 processes of one thread",
    )
    results: ResultsByLayout = {layout: run_ranks(*layout, setting) for layout in LAYOUTS}
    counts(out, results, setting)
    bits(out, results, model.num_layers)
    scaling(out, results)
    out.add("A single GPU's share of its peak", "G", "39 TFLOP/s, 30%", "no GPU in this run")
    out.add("512 V100: 15.1 PFLOP/s sustained", "X", "15.1 PFLOP/s, 76%", "not claimed: another machine")
    out.add(
        "WikiText-103 perplexity at 355M / 2.5B / 8.3B",
        "X",
        "19.31 / 12.76 / 10.81",
        "not claimed: models of that size were not trained",
    )
    return out


def run_ranks(
    processes: int, tensor: int, setting: dict[str, int], module: str = "headrace.reproduce.megatron_rank"
) -> list[dict[str, Any]]:
    """Each rank's report, in rank order. Raises `RuntimeError` where one fails; its standard error has the cause."""
    store = keep_store(processes, TIMEOUT) if processes > 1 else None
    job = {"size": processes, "tensor": tensor, "port": store.port if store else 0, "setting": setting}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, json.dumps({**job, "rank": rank})], stdout=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"a rank of {processes} failed: its standard error has the cause")
    return [json.loads(text) for text in outputs]


def tensor_parallel(results: ResultsByLayout) -> list[list[dict[str, Any]]]:
    """The ranks of every layout with one copy of the model on several ranks."""
    return [ranks for (processes, tensor), ranks in results.items() if processes == tensor > 1]


def counts(out: Table, results: ResultsByLayout, setting: dict[str, int]) -> None:
    """Collectives, their messages and volume, as counted by the ranks' group."""
    layers, width = setting["layers"], setting["width"]

    def each(way: str, column: int) -> str:
        """All-reduces per layer, counted by every rank at every degree."""
        found = {
            sum(rank["counted"][way][purpose][column] for purpose in ("attention", "mlp")) / layers
            for ranks in tensor_parallel(results)
            for rank in ranks
        }
        return " or ".join(f"{n:g}" for n in sorted(found))

    out.add("All-reduces a layer, forward + backward", "CE", "2 + 2", f"{each('none', 0)} + {each('none', 1)}")
    out.add(
        "… with full recomputation, backward",
        "CE",
        "2 + 2",
        f"{each('full', 1)}: it stops when backward has what it needs, which the block's last sum is not; "
        f"{each('full, to the end', 1)} where it repeats the whole block",
    )
    messages, volumes, sends = set(), set(), {}
    for ranks in tensor_parallel(results):
        for rank in ranks:
            for forward, backward, elements, volume in rank["counted"]["none"].values():
                messages.add(elements / (forward + backward) / rank["tokens"] / width)
                volumes.add(volume / elements)
            sends[len(ranks)] = ring(rank, len(ranks))
    out.add("Elements of a message", "CE", "b·s·h", " or ".join(f"{n:g}·b·s·h" for n in sorted(messages)))
    out.add("Volume of an all-reduce", "CE", "2× its message", " or ".join(f"{n:g}×" for n in sorted(volumes)))
    out.add(
        "Bytes a rank sends in all of a pass, of the ring's 2(p−1)/p of every message",
        "CE",
        "1",
        ", ".join(f"{share:.3f} at p = {p}" for p, share in sends.items()),
    )
    entropy(out, results)


def ring(rank: dict[str, Any], p: int) -> float:
    """Sent bytes over those of a ring: 2(p−1)/p of an all-reduce's message, (p−1)/p of an all-gather's."""
    expected = sum(n * (2 if key.startswith("all_reduce") else 1) * (p - 1) / p for key, n in rank["elements"].items())
    return float(rank["sent"] / (4 * expected))


def entropy(out: Table, results: ResultsByLayout) -> None:
    """The messages of the vocabulary-parallel cross-entropy."""
    found = set()
    for ranks in tensor_parallel(results):
        for rank in ranks:
            if any("logits" in key for key in rank["elements"]):
                found.add("logits gathered")
            scalars = sum(n for key, n in rank["elements"].items() if key.endswith(" cross_entropy"))
            found.add(f"{scalars / rank['targets']:g} scalars a target; logits are not moved")
    out.add("Vocabulary-parallel cross-entropy", "CE", "O(b·s) scalars, logits never gathered", " or ".join(found))


def bits(out: Table, results: ResultsByLayout, layers: int) -> None:
    """Loss, gradients, weights and random streams of every layout compared with one process, by ==."""
    alone, equal = results[1, 1][0], "mathematically equal"
    tensor = tensor_parallel(results)
    copied = [ranks for (processes, degree), ranks in results.items() if processes > degree]
    degrees = "degree " + ", ".join(str(len(ranks)) for ranks in ([alone], *tensor))

    def same(part: str) -> str:
        return _verdict(all(_covers(ranks, alone, part) for ranks in tensor))

    out.add(
        f"Loss at {degrees}",
        "CE",
        equal,
        _verdict(all(rank["loss"] == alone["loss"] for ranks in tensor for rank in ranks)),
    )
    out.add(f"Gradients, {len(alone['gradients'])} shards of tensors", "CE", equal, same("gradients"))
    for what, layouts in ((f"at {degrees}", tensor), ("of copies of the model, of one rank and of more", copied)):
        steps = len(alone["curve"]["steps"])
        out.add(
            f"Loss and gradient norm of {steps} steps and the weights after them, {what}",
            "CE",
            equal,
            _verdict(_same_curves(layouts, alone, "curve")),
        )
    streams = [bits for name, bits in alone["start"].items() if ".q_proj." in name]
    out.add(
        "Random streams: one outside the parallel region, others inside",
        "CE",
        "a different one per rank inside",
        f"one per virtual shard ({len(set(streams))} of {len(streams)} differ), so first weights are "
        f"{same('start')} at {degrees}",
    )
    out.add(
        "Residual initialisation, std over the others'",
        "CE",
        f"1/√(2N) = {(2 * layers) ** -0.5:.3f}",
        f"{alone['spread']:.3f} (of one sample)",
    )
    report = alone["dropout"]
    masks = all(rank["dropout"]["masks"] == report["masks"] for ranks in tensor for rank in ranks)
    out.add(
        f"Dropout under the two RNG streams, {degrees} and of copies",
        "CE",
        "same outside, different inside",
        f"outside (embedding, attention's and the MLP's output, rate {RATE}): {len(report['masks'])} masks with "
        f"{report['share']:.4f} of their elements are {_verdict(masks)} on every rank of a model, and so losses and "
        f"weights, copies' too, are {_verdict(_same_curves([*tensor, *copied], alone, 'dropout'))}; inside, there "
        "is no dropout, as the kernels do not keep attention's probabilities",
    )


def _verdict(ok: bool) -> str:
    return "equal by ==" if ok else "NOT equal"


def _same_curves(layouts: list[list[dict[str, Any]]], alone: dict[str, Any], part: str) -> bool:
    """Whether every rank had the steps of one process, and the ranks of a layout together its final weights."""
    curves = [[rank[part] for rank in ranks] for ranks in layouts]
    return all(curve["steps"] == alone[part]["steps"] for ranks in curves for curve in ranks) and all(
        _covers(ranks, alone[part], "weights") for ranks in curves
    )


def _covers(ranks: list[dict[str, Any]], alone: dict[str, Any], part: str) -> bool:
    """Whether every rank's digests equal those of one process, and all ranks together have all of them."""
    expected = alone[part]
    return all(rank[part].items() <= expected.items() for rank in ranks) and set().union(
        *(rank[part] for rank in ranks)
    ) == set(expected)


@dataclass(frozen=True, slots=True)
class Machine:
    """A cost model: time = operations / (degree · rate) + exchanges · latency + bytes / bandwidth, not overlapped."""

    rate: float
    """Operations per second of one process."""
    latency: float
    """Seconds of an exchange."""
    bandwidth: float
    """Bytes per second."""
    element: int = 4
    """Bytes of a number in a message."""

    @classmethod
    def fitted(cls, flops: float, seconds: float, link: list[list[float]]) -> Machine:
        """Fit the model to one process's pass and to [bytes, seconds] of exchanges, by least relative squares."""
        p, q = [1 / y for _, y in link], [x / y for x, y in link]
        pp, pq, qq = sum(u * u for u in p), sum(u * v for u, v in zip(p, q)), sum(v * v for v in q)
        determinant = pp * qq - pq * pq
        latency = (sum(p) * qq - sum(q) * pq) / determinant
        slope = (sum(q) * pp - sum(p) * pq) / determinant
        return cls(flops / seconds, max(latency, 0.0), 1 / slope)

    def sum_seconds(self, size: float, ranks: int) -> float:
        """Seconds of an all-reduce of `size` bytes by halving and doubling."""
        if ranks == 1:
            return 0.0
        exchanges = 2 * math.log2(ranks) if ranks > 2 else 1
        return exchanges * self.latency + 2 * (ranks - 1) / ranks * size / self.bandwidth

    def efficiency(self, hidden: int, layers: int, degree: int, copies: int = 1) -> float:
        """Compute's share of the time, for the paper's batch of 8 × 1024 tokens per copy."""
        tokens = BATCH * LENGTH
        more = LENGTH / (6 * hidden) + VOCABULARY / (16 * layers * hidden)
        operations = 96 * tokens * layers * hidden**2 * (1 + more)
        compute = operations / degree / self.rate
        sums = ALL_REDUCES * layers * self.sum_seconds(self.element * tokens * hidden, degree)
        parameters = 12 * layers * hidden**2 + VOCABULARY * hidden
        sums += self.sum_seconds(self.element * parameters / degree, copies)
        return compute / (compute + sums)


def like_the_paper_s() -> Machine:
    """V100s with fp16 messages, at the bandwidth for which the model is nearest to the paper's three figures."""

    def error(machine: Machine) -> float:
        return sum((machine.efficiency(*size) - paper) ** 2 for size, paper in zip(PUBLISHED[1:], WEAK))

    return min((Machine(V100, 0.0, 10 ** (9 + step / 100), 2) for step in range(400)), key=error)


def scaling(out: Table, results: ResultsByLayout) -> None:
    """The cost model of this machine, compared with a real run and applied to the paper's sizes."""
    alone, two = results[1, 1][0], results[2, 2]
    machine, theirs = Machine.fitted(alone["flops"], alone["seconds"], two[0]["link"]), like_the_paper_s()
    measured = max(rank["seconds"] for rank in two)
    predicted = (
        alone["flops"] / 2 / machine.rate + two[0]["messages"] * machine.latency + two[0]["sent"] / machine.bandwidth
    )
    out.add(
        "A model: time = operations / rate / degree + exchanges · latency + bytes / bandwidth, fitted to compute "
        "and links measured here",
        "S",
        "–",
        f"{machine.rate / 1e9:.1f} GFLOP/s a process, "
        f"{machine.latency * 1e6:.0f} µs and {machine.bandwidth / 1e9:.2f} GB/s a link",
    )
    out.add(
        "The model compared with a real pass of 2 processes",
        "S",
        "–",
        f"predicted {predicted * 1e3:.0f} ms, measured {measured * 1e3:.0f} ms on {_cores()} cores (one process: "
        f"{alone['seconds'] * 1e3:.0f} ms)",
    )
    for what, paper, sizes, copies in (
        ("Weak scaling at degree 2 / 4 / 8", WEAK, PUBLISHED[1:], 1),
        ("Weak scaling, 64 copies of degree 1 / 2 / 4 / 8", WITH_COPIES, PUBLISHED, COPIES),
    ):
        ours, fitted = (_percent(m.efficiency(*size, copies=copies) for size in sizes) for m in (machine, theirs))
        out.add(
            f"{what} (the paper's sizes, as recalled)",
            "S",
            f"{_percent(paper)} on V100s",
            f"a model, not a measurement: {ours} with this machine's {machine.rate / machine.bandwidth:.0f} "
            f"operations per byte of link; {fitted} with {theirs.rate / theirs.bandwidth:.0f}, fitted to 95 / "
            "82 / 77",
        )


def _percent(shares: Iterable[float]) -> str:
    return " / ".join(f"{100 * share:.0f}" for share in shares) + "%"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
