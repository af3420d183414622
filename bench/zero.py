"""ZeRO's stages compared with each other, with PyTorch's DDP and FSDP2, and with DeepSpeed.

    python bench/zero.py [--quick] [--only WORDS] [--deepspeed PYTHON]

The 12m model of bench/train.py, on processes of one thread each: 2 of them, and 4, which on two cores share them. All
sides start from the same weights and read the same rows in the same order, in turn; their last losses show it.

    plain      our stages 0, 1 and 2 and DDP          deepspeed   our stages 0, 1 and 2 and DeepSpeed's
    divided    our stage 3, FSDP2, DeepSpeed's 3      overlap     our stages with and without it
    snapshots  the cost of one per minute, and the time to resume

Prints tokens per second, ratios of neighbouring runs with their bars, the peak memory of all ranks together, bytes sent
and the share of a step for which a rank waited for others. PYTHON is the interpreter of an environment with torch,
transformers and deepspeed (default: HEADRACE_DEEPSPEED_PYTHON); without one, DeepSpeed is not measured. `--only` runs
the cases whose names have all WORDS; docs/results/zero.json keeps the results of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.bench.measure import in_turn, pairs, rates, write_results
from headrace.train.config import DataConfig
from headrace.train.data import open_source
from sides import Side, laid_out
from train import SIZES, checkpoint, corpus

MODEL, ROWS, TOKENS = SIZES["12m"]
BATCHES = 48
"""More than the steps of any side."""
SCRIPT = Path(__file__).with_name("zero_sides.py")
PLAIN = ["headrace:0", "headrace:1", "headrace:2"]
ALL = [*PLAIN, "headrace:3"]


@dataclass(frozen=True)
class Test:
    """Sides that are measured in turn, and (ours, theirs, least ratio) of each comparison."""

    sides: Sequence[str]
    bars: Sequence[tuple[str, str, float | None]]


TESTS = {
    "plain": Test(
        [*PLAIN, "ddp"],
        [
            ("headrace:1", "headrace:0", 0.95),
            ("headrace:2", "headrace:0", 0.95),
            *((ours, "ddp", 1.05) for ours in PLAIN),
        ],
    ),
    "deepspeed": Test(
        [*PLAIN, "deepspeed:0", "deepspeed:1", "deepspeed:2"],
        [(f"headrace:{i}", f"deepspeed:{i}", 1.05) for i in range(3)],
    ),
    "divided": Test(
        ["headrace:3", "fsdp", "deepspeed:3"], [("headrace:3", "fsdp", 1.05), ("headrace:3", "deepspeed:3", 1.1)]
    ),
    "overlap": Test(
        [side + way for side in ALL for way in ("", ":still")], [(side, f"{side}:still", None) for side in ALL]
    ),
    "snapshots": Test([f"snapshots:{stage}" for stage in (0, 2, 3)], []),
}
CASES = [(ranks, "float32", name) for ranks in (2, 4) for name in ("plain", "deepspeed", "divided")]
CASES += [(2, "bfloat16", name) for name in ("deepspeed", "divided")]
CASES += [(2, "float32", name) for name in ("overlap", "snapshots")]
"""Products in bfloat16 are slow in torch on a CPU: only the peers' memory is comparable."""


def main() -> None:
    """Run all cases, or the chosen ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one step per round, to try the script")
    parser.add_argument("--only", help="words in a case's name, as in '2 float32 divided'")
    parser.add_argument("--deepspeed", default=os.environ.get("HEADRACE_DEEPSPEED_PYTHON", ""), metavar="PYTHON")
    arguments = parser.parse_args()
    path = Path("docs/results/zero.json")
    cases: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        folder = prepared(Path(work))
        for ranks, dtype, name in CASES:
            title = f"{ranks} ranks, {dtype}, {name}"
            if not set((arguments.only or "").split()) <= set(title.replace(",", "").split()):
                continue
            print(f"\n{title}" + (" (more processes than cores)" if ranks > (os.cpu_count() or 1) else ""))
            before = rates(2)
            cases[title] = measured(TESTS[name], folder, ranks, dtype, arguments.quick, arguments.deepspeed)
            cases[title]["rates"] = [before, rates(2)]
            if not arguments.quick:
                write_results("zero", {"cases": cases})


def measured(test: Test, folder: Path, ranks: int, dtype: str, quick: bool, deepspeed: str) -> dict[str, Any]:
    """Run one case: figures of every side, and the ratios."""
    left_out = [] if deepspeed else [kind for kind in test.sides if kind.startswith("deepspeed")]
    for kind in left_out:
        print(f"  {kind:16s} not measured: name its python with --deepspeed")
    kinds = [kind for kind in test.sides if kind not in left_out]
    last: dict[str, dict[str, Any]] = {}
    steps, rounds = (1, 1) if quick else (1, 2) if dtype != "float32" else (2, 4)
    alone = kinds[0].startswith("snapshots")
    with ExitStack() as stack:
        sides = {}
        for kind in kinds:
            python = {"python": deepspeed} if kind.startswith("deepspeed") else {}
            sides[kind] = Side(SCRIPT, (kind, folder, dtype), ranks, **python)
            stack.callback(sides[kind].close)

        def measure(kind: str) -> float:
            last[kind] = sides[kind].run(1 if alone else steps)
            return ROWS * TOKENS / statistics.median(last[kind]["seconds"])

        speeds = in_turn(
            [lambda kind=kind: measure(kind) for kind in kinds],  # type: ignore[misc]
            1 if alone else rounds,
            0 if alone else 1,
        )
    found = dict(zip(kinds, speeds))
    for kind in kinds:
        report(kind, found[kind], last[kind])
    bars = [held(ours, theirs, bar, found, last) for ours, theirs, bar in test.bars if theirs not in left_out]
    return {
        "sides": {kind: {"tokens_per_second": found[kind], **last[kind]} for kind in kinds},
        "ratios": bars,
        "not measured": left_out,
    }


def report(kind: str, speed: Sequence[float], last: dict[str, Any]) -> None:
    """Print a side's figures."""
    if "resume" in last:
        print(
            f"  {kind:16s} a snapshot costs {last['snapshot']:.2f} s, one a minute {last['snapshot'] / 60:.1%} (bar "
            f"5%); a run begins in {last['begin']:.2f} s, resumes in {last['resume']:.2f} s; "
            f"a step {last['step']:.2f} s, loss {last['loss']:.5f}"
        )
        return
    ours = (
        (
            f"  sent {last['bytes'] / 2**20:5.1f} MiB, in messages {last['communication'] / last['seconds'][-1]:4.0%}, "
            f"waiting {last['waited'] / last['seconds'][-1]:4.0%} of a step"
        )
        if "bytes" in last
        else ""
    )
    print(
        f"  {kind:16s} {statistics.median(speed):6.0f} tokens/s  memory {last['memory'] / 2**20:5.0f} MiB  "
        f"loss {last['loss']:.5f}{ours}",
        flush=True,
    )


def held(
    ours: str, theirs: str, bar: float | None, found: dict[str, list[float]], last: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Print a ratio beside its bar, and return its record."""
    speed = pairs(found[ours], found[theirs])
    memory = last[ours]["memory"] / last[theirs]["memory"]
    verdict = "" if bar is None else f"bar {bar:.2f}: {'holds' if speed.ratio >= bar else 'FALLS SHORT'}"
    print(f"  {ours:12s} / {theirs:16s} {speed.verdict:28s} {verdict:22s} memory {memory:.2f}×", flush=True)
    return {
        "ours": ours,
        "theirs": theirs,
        "bar": bar,
        "ratio": speed.ratio,
        "range": [speed.low, speed.high],
        "holds": None if bar is None else speed.ratio >= bar,
        "memory": memory,
        "memory holds": memory <= 1.0,
    }


def prepared(work: Path) -> Path:
    """The folder from which all sides start, see zero_sides.py."""
    data = corpus(work, MODEL.vocab_size)
    folder = checkpoint(work / "12m", data, MODEL)
    recipe = folder / "recipe.toml"
    text = recipe.read_text().replace("[data]", f'[data]\nsource = "{data}"')
    text = text.replace("[train]", f"[train]\nbatch_size = {ROWS}\nseq_length = {TOKENS}")
    recipe.write_text(text.replace("[model]", f'[model]\ninit = "{folder}"'))
    stream = open_source(DataConfig(str(data), 0, shuffle="pieces").resolved()).stream(ROWS, TOKENS)
    torch.save([laid_out(stream.next(), ROWS, TOKENS) for _ in range(BATCHES)], folder / "batches.pt")
    kernels = Side(SCRIPT, ("headrace:0", folder, "float32"))
    kernels.run(1)  # compile once, which takes more memory than a step
    kernels.close()
    return folder


if __name__ == "__main__":
    main()
