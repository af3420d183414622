"""The sides of the training comparisons: their processes, the protocol between them, and our trainer as a side.

A side is a script that is called with its own arguments and then RANK SIZE PORT. It reads lines with a number of steps,
does them, and answers with a JSON line: the seconds of each, the CPU's seconds of all, the loss, the peak of
memory. Between lines it waits.
This module imports headrace only in `trainer`, so that a peer can run in an environment of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Side", "Step", "gloo", "laid_out", "peak_memory", "serve", "trainer"]

Step = Callable[[], tuple[float, dict[str, Any]]]
"""One step: returns its loss and other figures."""


class Side:
    """The benchmark's handle of the processes of one side."""

    def __init__(self, script: Path, words: Sequence[object], ranks: int = 1, python: str = sys.executable) -> None:
        self._what = f"{script.name} {words[0]}"
        port = _free_port()
        self._processes = [
            subprocess.Popen(
                [python, script, *map(str, words), str(rank), str(ranks), str(port)],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]

    def run(self, steps: int) -> dict[str, Any]:
        """Do some steps; returns rank 0's figures, with the memory of all ranks and the mean of their losses."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the side {self._what} ended: its standard error has the cause")
            answers.append(json.loads(line))
        return {
            **answers[0],
            "memory": sum(answer["memory"] for answer in answers),
            "loss": sum(answer["loss"] for answer in answers) / len(answers),
        }

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait()


def serve(make: Callable[[], Step]) -> None:
    """Serve one rank of one side, whose own output goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = make()
    for line in sys.stdin:
        seconds: list[float] = []
        loss, cpu = 0.0, time.process_time()
        figures: dict[str, Any] = {}
        for _ in range(int(line)):
            began = time.perf_counter()
            loss, figures = step()
            seconds.append(time.perf_counter() - began)
        answer = {
            "seconds": seconds,
            "loss": loss,
            "memory": peak_memory(),
            "cpu": time.process_time() - cpu,
            **figures,
        }
        out.write(json.dumps(answer) + "\n")
        out.flush()


def trainer(recipe: Path, changes: Sequence[str], threads: int, tensor: int, rank: int, size: int, port: int) -> Step:
    """Our trainer by a recipe, `tensor` ranks to a copy of the model."""
    import torch

    from headrace.kernels.load import load_ops
    from headrace.parallel.mesh import Mesh
    from headrace.parallel.rendezvous import join, keep_store
    from headrace.train.config import load_recipe
    from headrace.train.trainer import Trainer

    mesh = Mesh()
    if size > 1:
        store = keep_store(size, 60, port) if rank == 0 else join(port, size, 60)
        mesh = Mesh.meet(store, rank, size, tensor, torch.device("cpu"))
    ops = load_ops("cpu", threads=threads)
    ours = Trainer(load_recipe(recipe, [*changes, f"parallel.tensor={tensor}"]), ops, mesh)
    torch.set_num_threads(threads)
    traffic = (mesh.tensor if tensor > 1 else mesh.data).traffic

    def step() -> tuple[float, dict[str, Any]]:
        traffic.clear()
        waited = ours.sharded.waited
        record = ours.step()
        return record.loss, {
            "communication": traffic.seconds,
            "waited": ours.sharded.waited - waited,
            "bytes": traffic.bytes_sent,
            "volume": traffic.volume(),
        }

    return step


def laid_out(batch: Any, rows: int, tokens: int) -> tuple[Any, Any, int]:
    """(ids, targets [rows, tokens], number of targets) of our batch, by rows; −100 where there is no target."""
    import torch

    targets_T = torch.full((batch.num_tokens,), -100)
    targets_T[batch.rows_R] = batch.targets_R
    row_T = torch.repeat_interleave(torch.tensor(batch.row_of), torch.tensor(batch.lengths))
    ids, targets = torch.zeros(rows, tokens, dtype=torch.int64), torch.full((rows, tokens), -100)
    for row in range(batch.num_rows):
        mine = row_T == row
        ids[row, : int(mine.sum())], targets[row, : int(mine.sum())] = batch.ids_T[mine], targets_T[mine]
    return ids, targets, len(batch.rows_R)


def gloo(rank: int, size: int, port: int) -> None:
    """Join torch's default process group, on the loopback."""
    import torch.distributed as dist

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
    }
    dist.init_process_group("gloo")


def peak_memory() -> int:
    """Peak bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
