"""All serving peers beside headrace in one table: the same random model, the same loads, one machine, in turn.

    .venv/bin/python bench/peers.py install [--envs .venv-peers] [--only vllm,…] [--minutes 30] [--again]
    .venv/bin/python bench/peers.py [--rounds 5] [--only headrace,llama.cpp-bf16,…] [--workloads dec1,…] [--fresh]
    .venv/bin/python bench/peers.py table

Model "small": random Llama, 100M parameters. dec1: decode at batch 1, 128 tokens behind 128. dec16: 16 × (128 in, 128
out), in brackets without the prefill. pre: a prompt of 1024. online: 32 requests at once. shared: the same behind one
prefix of 512 that no cache has seen. All are tokens a second: output, or prompt for pre.

In a round, every workload runs on each side in turn; other sides are stopped meanwhile. Every cell is kept when it is
measured, and the same command goes on after an interruption. It prints the table and writes docs/results/peers.json.
Each side's KV cache has the dtype that the peer gives it by itself. --quick tries the script; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from safetensors import safe_open

from headrace.bench.measure import machine, rates, write_results  # before torch: headrace says how its threads wait
from headrace.bench.models import random_checkpoint
from peer_envs import OURS, PEERS, SPECS, Environment, Spec, prepare, processor
from peer_process import Running, SideError
from peer_table import Cell, State, markdown, summary
from peer_work import FULL, QUICK, WORKLOADS, make_task

FOLDER = Path("runs/bench/peers")


def chosen(only: str) -> list[Spec]:
    """The rows that --only names, by row or by peer; ours is always among them."""
    names = set(only.split(",")) if only else {spec.peer for spec in SPECS}
    if unknown := names - {spec.peer for spec in SPECS} - {spec.name for spec in SPECS}:
        raise SystemExit(f"--only {','.join(sorted(unknown))}: there are {', '.join(spec.name for spec in SPECS)}")
    return [spec for spec in SPECS if spec.name == OURS or names & {spec.peer, spec.name}]


def revision() -> str:
    """The state of src in git: measurements of other code are not comparable."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()

    changed = ", changed" if git("status", "--porcelain", "src") else ""
    return (git("rev-parse", "--short", "HEAD:src") or "unknown") + changed


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What cells of one file have in common, as JSON gives it back."""
    sizes = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(_sizes(arguments)).items()}
    return {"threads": arguments.threads, "sizes": sizes, "processor": processor(), "source": revision()}


def _sizes(arguments: argparse.Namespace) -> Any:
    return QUICK if arguments.quick else FULL


def parameters(checkpoint: Path) -> int:
    """The weights of a checkpoint, a tied head counted once, which is how often a token reads it."""
    found = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "np") as tensors:
            found += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return found


def standing(spec: Spec, envs: Path) -> str:
    """Why a row cannot be measured here; empty if it can."""
    if spec.needs and spec.needs not in processor()["flags"]:
        return f"this processor has no {spec.needs}, so it would repeat another row"
    return "" if spec.peer == "headrace" else Environment(envs, spec.peer).reason


class Race:
    """The sides of a run, and the state that they fill."""

    def __init__(self, arguments: argparse.Namespace, state: State) -> None:
        self.arguments = arguments
        self.state = state
        self.sizes = _sizes(arguments)
        self.workloads = [name for name in WORKLOADS if name in arguments.workloads.split(",")]
        self.checkpoints = {
            "bf16": random_checkpoint("small", Path("runs/bench/small")),
            "fp32": random_checkpoint("small", Path("runs/bench/small-fp32"), dtype="float32"),
        }
        self.sides: dict[str, Running] = {}
        self.not_run: dict[str, str] = {}
        self._versions: dict[str, str] = {}
        self._lost: set[tuple[str, str]] = set()
        self._began = round(time.time())

    def enter(self, specs: Sequence[Spec]) -> None:
        """Find each row's environment and model; a row that has none gets its reason."""
        for spec in specs:
            reason = standing(spec, self.arguments.envs)
            environment = None if spec.peer == "headrace" else Environment(self.arguments.envs, spec.peer)
            try:
                if not reason:
                    model = prepare(spec, environment, self.checkpoints, FOLDER / "models")
                    python = environment.python if environment else sys.executable
                    preload = environment.preload if environment else []
                    self.sides[spec.name] = Running(
                        spec, python, model, self.arguments.threads, FOLDER / "logs", preload
                    )
                    self._versions[spec.name] = environment.record["version"] if environment else revision()
            except RuntimeError as error:
                reason = str(error)
            if reason:
                self.not_run[spec.name] = reason
                print(f"{spec.name}: {reason}", flush=True)

    def run(self) -> None:
        """Measure the cells that the state has not, round by round."""
        for turn in range(self.arguments.rounds):
            names = list(self.sides) if turn % 2 == 0 else list(reversed(self.sides))
            cells = [(turn, name, work) for work in self.workloads for name in names]
            wanted = [cell for cell in cells if self._wanted(cell)]
            if not wanted:
                continue
            # A peer that is measured after an interruption needs ours beside it, which was measured long before.
            wanted = [
                cell for cell in cells if cell in wanted or (cell[1] == OURS and any(o[2] == cell[2] for o in wanted))
            ]
            self._rates(turn, "before")
            for cell in wanted:
                if cell[1:] not in self._lost:
                    place = names.index(cell[1])
                    # The side measured last has its next turn last.
                    others = [self.sides[name] for name in reversed(names[place + 1 :] + names[:place])]
                    self._measure(*cell, others)
            self._rates(turn, "after")

    def _wanted(self, cell: Cell) -> bool:
        return cell not in self.state.cells and cell[1:] not in self._lost

    def _rates(self, turn: int, when: str) -> None:
        found = rates(self.arguments.threads)
        self.state.add({"turn": turn, "when": when, "rates": found})
        print(
            f"round {turn + 1}, {when}: {found['read_gb_s']:.1f} GB/s, {found['matrix_gflop_s']:.0f} GFLOP/s",
            flush=True,
        )

    def _measure(self, turn: int, name: str, work: str, others: Sequence[Running]) -> None:
        side = self.sides[name]
        record = {"run": self._began, "turn": turn, "side": name, "workload": work, "version": self._versions[name]}
        lost = self.workloads  # all, if it does not start
        try:
            side.wake(make_task("warm", self.sizes, turn), others)
            lost = [work]
            record |= side.ask(make_task(work, self.sizes, turn))
            text = f"{record['rate']:8.1f} tok/s" + (f" [{record['decode']:.1f}]" if "decode" in record else "")
        except SideError as error:
            record["error"] = text = str(error)
            self._lost |= {(name, one) for one in lost}
            side.close()
        finally:
            side.pause()
        self.state.add(record)
        print(f"round {turn + 1}/{self.arguments.rounds}  {work:8}{name:20}{text}", flush=True)

    def report(self, write: bool) -> None:
        """Print the table, and write it unless the run only tried the script or was interrupted."""
        weights = parameters(self.checkpoints["bf16"])
        measured = {name for _, name, _ in self.state.cells} | {name for name, _ in self.state.errors}
        facts = {s.name: {"weight_bytes": round(weights * s.weight)} for s in SPECS if s.name in measured}
        rows = summary(self.state, facts, OURS)
        missing = [spec for spec in SPECS if spec.name not in rows]
        reasons = {s.name: self.not_run.get(s.name) or standing(s, self.arguments.envs) for s in missing}
        not_run = {name: why or "not measured yet" for name, why in reasons.items()}
        print("\n" + markdown(rows, not_run, WORKLOADS))
        reads = [record["rates"]["read_gb_s"] for record in self.state.rates]
        matrix = [record["rates"]["matrix_gflop_s"] for record in self.state.rates]
        if reads:
            print(f"machine: {min(reads):.1f}–{max(reads):.1f} GB/s, {min(matrix):.0f}–{max(matrix):.0f} GFLOP/s")
        if not write:
            print("nothing written")
            return
        found = {
            "machine": machine() | processor(),
            "command": " ".join(["bench/peers.py", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
            "settings": self.state.settings,
            "rates": self.state.rates,
            "rows": rows,
            "not_run": not_run,
        }
        print(f"wrote {write_results(self.arguments.name, found)}")

    def close(self) -> None:
        for side in self.sides.values():
            side.close()


def install(arguments: argparse.Namespace) -> None:
    """Make the environments one after another, and tell which could not be made."""
    names = arguments.only.split(",") if arguments.only else list(PEERS)
    if unknown := set(names) - PEERS.keys():
        raise SystemExit(f"--only {','.join(sorted(unknown))}: there are {', '.join(PEERS)}")
    for name in names:
        environment = Environment(arguments.envs, name)
        if not arguments.again and not environment.reason:
            print(f"{name}: {environment.record['version']}, already there")
            continue
        outcome = environment.install(arguments.minutes)
        print(f"{name}: {outcome['reason'] or outcome['version']}, {outcome['seconds']} s", flush=True)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", default="run", choices=("run", "install", "table"))
    parser.add_argument("--envs", type=Path, default=Path(".venv-peers"), help="the folder of the peers' environments")
    parser.add_argument("--only", default="", help="peers or rows, with commas between")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on with the file of cells; so it does without")
    parser.add_argument("--fresh", action="store_true", help="forget the cells measured before")
    parser.add_argument("--quick", action="store_true", help="one tiny round, to try the script")
    parser.add_argument("--state", type=Path, help="the file of cells")
    parser.add_argument("--name", default="peers", help="name of the file in docs/results")
    parser.add_argument("--minutes", type=float, default=30.0, help="limit of one peer's installation")
    parser.add_argument("--again", action="store_true", help="install what is installed already")
    arguments = parser.parse_args()
    if unknown := set(arguments.workloads.split(",")) - set(WORKLOADS):
        parser.error(f"--workloads {','.join(sorted(unknown))}: there are {', '.join(WORKLOADS)}")
    if arguments.resume and arguments.fresh:
        parser.error("--resume and --fresh are opposites")
    if arguments.quick:
        arguments.rounds = 1
    arguments.state = arguments.state or FOLDER / ("quick.jsonl" if arguments.quick else "cells.jsonl")
    return arguments


def main() -> None:
    """Install, measure or print."""
    arguments = options()
    if arguments.command == "install":
        install(arguments)
        return
    table = arguments.command == "table"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the stopped sides would stay
    race = Race(arguments, State(arguments.state, None if table else settings(arguments), arguments.fresh))
    whole = False
    try:
        if not table:
            race.enter(chosen(arguments.only))
            race.run()
        whole = True
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here")
    finally:
        race.close()
    race.report(write=whole and not arguments.quick)
    if not whole:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
