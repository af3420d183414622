"""Functions run by several processes that form one tensor-parallel group; each returns what JSON can hold."""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from headrace.parallel.group import RankGroup
from headrace.parallel.mesh import Mesh
from headrace.parallel.rendezvous import connect, join, keep_store

TESTS = Path(__file__).parents[1]
SECONDS = 120.0
CPU = torch.device("cpu")


class RankPool:
    """`size` processes that wait for jobs, a line of JSON each; they connect again for every job."""

    def __init__(self, size: int) -> None:
        self._store = keep_store(size, SECONDS)
        self._jobs = 0
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "parallel.rank_kit", str(rank), str(size), str(self._store.port)],
                cwd=TESTS,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(size)
        ]
        atexit.register(self.close)

    def run(self, job: dict[str, Any]) -> list[Any]:
        self._jobs += 1
        pipes = [self._pipes(process) for process in self._processes]
        for into, _ in pipes:
            into.write(json.dumps({**job, "number": self._jobs}) + "\n")
            into.flush()
        answers = [out.readline() for _, out in pipes]
        assert all(answers), "a rank failed: see standard error"
        return [json.loads(answer) for answer in answers]

    def close(self) -> None:
        for process in self._processes:
            for pipe in self._pipes(process):
                pipe.close()
            process.wait()

    @staticmethod
    def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
        assert process.stdin is not None and process.stdout is not None
        return process.stdin, process.stdout


pool = lru_cache(RankPool)


def run_ranks(function: str, size: int, *arguments: Any, link: str = "auto", sequence: bool = False) -> list[Any]:
    """What `function` ("module:name") gives as f(group, *arguments) on each of `size` processes, in rank order."""
    if size == 1:
        return [_load(function)(RankGroup(), *arguments)]
    return pool(size).run({"function": function, "arguments": arguments, "link": link, "sequence": sequence})


def run_mesh(
    function: str, size: int, tensor: int, *arguments: Any, sequence: bool = False, library: bool = False
) -> list[Any]:
    """The same as f(mesh, *arguments), `tensor` of the `size` processes to a copy of the model."""
    if size == 1:
        return [_load(function)(Mesh(), *arguments)]
    return pool(size).run(
        {"function": function, "arguments": arguments, "tensor": tensor, "sequence": sequence, "library": library}
    )


def _load(name: str) -> Any:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    rank, size, port = map(int, sys.argv[1:])
    store = join(port, size, SECONDS)
    for line in sys.stdin:
        job = json.loads(line)
        here = dist.PrefixStore(f"job {job['number']}", store)
        place: Any
        if "tensor" in job:
            place = Mesh.meet(here, rank, size, job["tensor"], CPU, job["sequence"], SECONDS, job["library"])
        else:
            place = connect(here, rank, size, CPU, SECONDS, job["sequence"], job["link"])
        out.write(json.dumps(_load(job["function"])(place, *job["arguments"])) + "\n")
        out.flush()
        place.close()


if __name__ == "__main__":
    main()
