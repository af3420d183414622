"""ZeRO (Rajbhandari et al., 2020): its memory table, bytes held and moved at every stage, the same bits at each."""

from __future__ import annotations

from typing import Any

from headrace.reproduce.megatron import run_ranks
from headrace.reproduce.table import Table

__all__ = ["PUBLISHED", "SETTINGS", "formula", "table"]

SETTINGS = {
    True: {"layers": 4, "width": 64, "steps": 2, "rows": 4, "seq_length": 64},
    False: {"layers": 6, "width": 128, "steps": 10, "rows": 4, "seq_length": 128},
}
"""By `quick`."""
COPIES = (2, 4)
STAGES = ("none", "P_os", "P_os+g", "P_os+g+p")
PUBLISHED = {
    1: (120, 120, 120),
    4: (52.5, 41.3, 30),
    16: (35.6, 21.6, 7.5),
    64: (31.4, 16.6, 1.88),
    256: (30.4, 15.4, 0.47),
    1024: (30.1, 15.1, 0.12),
}
"""GB a device of 7.5 billion parameters at P_os, P_os+g, P_os+g+p, by the number of copies (figure 1, table 1)."""
MODULE = "headrace.reproduce.zero_rank"

ResultsByCopies = dict[int, list[dict[str, Any]]]
"""The ranks' reports, by the number of copies."""


def table(quick: bool = False) -> Table:
    """The paper's rows, measured now."""
    setting = SETTINGS[quick]
    out = Table(
        "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
        f"a Llama of {setting['layers']} layers of {setting['width']} in bfloat16, CPU kernels, run as "
        "2 and 4 copies, processes of one thread; the 7.5 billion by formula",
    )
    results: ResultsByCopies = {copies: run_ranks(copies, 1, setting, MODULE) for copies in COPIES}
    by_formula(out)
    held(out, results)
    moved(out, results)
    bits(out, results)
    activations(out, run_ranks(2, 2, setting, MODULE))
    largest(out)
    out.add("400 V100: 15 PFLOP/s, superlinear speed-up", "X", "38 TFLOP/s a GPU [m]", "not claimed: another machine")
    return out


def formula(stage: int, copies: int, width: int = 2, master: int = 12) -> float:
    """Bytes per parameter on each of `copies` (§5): `width` for weights and gradients, `master` for the optimizer."""
    weights, gradients = (width / (copies if stage >= since else 1) for since in (3, 2))
    return weights + gradients + master / (copies if stage >= 1 else 1)


def by_formula(out: Table) -> None:
    """The paper's table, cell by cell."""
    for copies, published in PUBLISHED.items():
        ours = [7.5 * formula(stage, copies) for stage in (1, 2, 3)]
        out.add(
            f"7.5B on {copies} copies, GB a device: P_os / +g / +p",
            "CE",
            " / ".join(f"{x:g}" for x in published),
            " / ".join(f"{x:.3g}" for x in ours),
        )


def held(out: Table, results: ResultsByCopies) -> None:
    """Bytes of the ranks' states, beside the formula's."""
    for stage, name in enumerate(STAGES):
        shares = []
        for copies, ranks in results.items():
            most = max(sum(rank["stages"][stage]["states"].values()) for rank in ranks)
            shares.append(f"{most / ranks[0]['parameters']:.2f}Ψ of {formula(stage, copies):g}Ψ at N = {copies}")
        out.add(
            f"Bytes of states, {name}",
            "CE",
            ("16Ψ", "4Ψ + 12Ψ/N", "2Ψ + 14Ψ/N", "16Ψ/N")[stage],
            ", ".join(shares) + ("" if stage else "; ranks' slots end at chunks of 4096 elements"),
        )


def moved(out: Table, results: ResultsByCopies) -> None:
    """Volume of a step with one micro-step, in Ψ, as counted by the group."""
    for stage, name in enumerate(STAGES):
        found, sent = set(), []
        for copies, ranks in results.items():
            for rank in ranks:
                report, psi = rank["stages"][stage], rank["parameters"]
                found.add(f"{(report['gradients'] + report['weights_moved']) / psi:.2f}Ψ")
                sent.append(report["sent"] / 2 / psi / (1 - 1 / copies))
        why = ": backward needs no weights of the embedding and the head" if stage == 3 else ""
        out.add(
            f"Volume of a micro-step, {name}",
            "CE",
            ("2Ψ", "2Ψ", "2Ψ", "3Ψ")[stage],
            f"{' or '.join(sorted(found))}{why}; a rank sends {min(sent):.2f} to {max(sent):.2f} · Ψ(N−1)/N",
        )


def bits(out: Table, results: ResultsByCopies) -> None:
    """Whether every stage has the same losses, norms and weights."""
    same = all(
        rank["stages"][stage][what] == ranks[0]["stages"][0][what]
        for ranks in results.values()
        for rank in ranks
        for stage in range(4)
        for what in ("curve", "weights")
    )
    out.add(
        "Stages train the same model",
        "CE",
        "not claimed to the bit",
        "losses, norms and weights equal by == at stages 0, 1, 2, 3" if same else "NOT equal",
    )


def activations(out: Table, ranks: list[dict[str, Any]]) -> None:
    """The volume that P_a adds to tensor parallelism's."""
    plain, divided = (max(rank[way]["tensor"] for rank in ranks) for way in ("plain", "divided"))
    kept = max(rank["divided"]["kept"] for rank in ranks) / max(rank["plain"]["kept"] for rank in ranks)
    same = all(rank["plain"]["curve"] == rank["divided"]["curve"] for rank in ranks)
    out.add("P_a: added traffic", "CE", "under 10%", f"{divided / plain - 1:.1%} at tensor parallelism of 2")
    out.add(
        "P_a: checkpoints a rank keeps", "CE", "1/N_m", f"{kept:.2f}; losses {'equal by ==' if same else 'NOT equal'}"
    )


def largest(out: Table) -> None:
    """The largest model whose states alone fit into 32 GB."""
    sizes = [32 / formula(stage, 64) for stage in range(4)]
    out.add(
        "Largest model on 64 devices of 32 GB, states alone",
        "S",
        "2B / 7.6B / 14.4B / 128B [m]",
        " / ".join(f"{size:.3g}B" for size in sizes),
    )
