"""The sides of the training comparison, each rank in a process of its own.

    python bench/train_sides.py KIND FOLDER DATA ROWS TOKENS THREADS [RANK SIZE PORT]

KIND is headrace, torch, compile or dtensor (torch's own tensor parallelism). Reads a number of steps a line, does them,
and answers with a JSON line: the seconds of each, the loss, the peak of memory. A side that is not measured waits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RATE = 1e-4


class Side:
    """The processes of one side, seen from the benchmark."""

    def __init__(self, kind: str, folder: Path, data: Path, rows: int, tokens: int, threads: int, ranks: int = 1,
                 port: int = 0) -> None:
        self.kind = kind
        command = [sys.executable, __file__, kind, folder, data, rows, tokens, threads]
        self._processes = [
            subprocess.Popen([*map(str, command), *([str(rank), str(ranks), str(port)] if ranks > 1 else [])],
                             text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for rank in range(ranks)]

    def run(self, steps: int) -> dict[str, Any]:
        """Do some steps; what rank 0 says, the peak of memory being that of all ranks."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the {self.kind} side died: see what it said")
            answers.append(json.loads(line))
        return {**answers[0], "memory": sum(answer["memory"] for answer in answers)}

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def headrace(folder: str, data: str, rows: int, tokens: int, threads: int, rank: int, size: int,
             port: int) -> Callable[[], tuple[float, dict[str, Any]]]:
    """Our trainer, from the weights in `folder`."""
    from headrace.kernels.ops import load_ops
    from headrace.parallel.mesh import Mesh
    from headrace.parallel.rendezvous import join, keep_store
    from headrace.train.config import load_recipe
    from headrace.train.trainer import Trainer

    mesh = Mesh()
    if size > 1:
        store = keep_store(size, 60, port) if rank == 0 else join(port, size, 60)
        mesh = Mesh.meet(store, rank, size, size, torch.device("cpu"))
    recipe = Path(folder) / "recipe.toml"
    trainer = Trainer(load_recipe(recipe, [f"model.init={folder}", f"data.source={data}", f"train.batch_size={rows}",
                                           f"train.seq_length={tokens}", f"parallel.tensor={size}"]),
                      load_ops("cpu", threads=threads), mesh)
    torch.set_num_threads(threads)

    def step() -> tuple[float, dict[str, Any]]:
        traffic = trainer.model.group.traffic
        traffic.clear()
        record = trainer.step()
        return record.loss, {"communication": traffic.seconds, "bytes": traffic.bytes_sent,
                             "volume": traffic.volume()}

    return step


def torch_side(kind: str, folder: str, data: str, rows: int, tokens: int, threads: int, rank: int, size: int,
               port: int) -> Callable[[], tuple[float, dict[str, Any]]]:
    """The transformers model with fused AdamW; compiled, or split by torch.distributed.tensor."""
    from transformers import LlamaForCausalLM

    from headrace.train.config import DataConfig
    from headrace.train.data import open_source

    torch.set_num_threads(threads)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if kind == "dtensor":
        _split(model, rank, size, port)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=kind != "dtensor")
    call = torch.compile(model) if kind == "compile" else model
    stream = open_source(DataConfig(data, 0, shuffle="pieces").resolved()).stream(rows, tokens)

    def step() -> tuple[float, dict[str, Any]]:
        ids = stream.next().ids_T[: rows * tokens].view(rows, tokens)
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        if kind == "dtensor":
            _clip(list(model.parameters()))
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()), {}

    return step


def _clip(parameters: list[Any]) -> None:
    """`clip_grad_norm_` where some gradients are split tensors and some are not, which it does not take."""
    norms = [parameter.grad.norm() for parameter in parameters]
    whole = torch.stack([norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]).norm()
    for parameter in parameters:
        parameter.grad.mul_(min(1.0, 1.0 / float(whole)))


def _split(model: Any, rank: int, size: int, port: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo")
    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")} | {"mlp.down_proj": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (size,))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)


def peak_memory() -> int:
    """Bytes that this process held at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Serve one rank of one side."""
    kind, folder, data, *numbers = sys.argv[1:]
    rows, tokens, threads, rank, size, port = (*map(int, numbers), *(0, 1, 0)[len(numbers) - 3 :])
    out, sys.stdout = sys.stdout, sys.stderr
    arguments = (folder, data, rows, tokens, threads, rank, size, port)
    step = headrace(*arguments) if kind == "headrace" else torch_side(kind, *arguments)
    for line in sys.stdin:
        seconds, loss, told = [], 0.0, {}
        for _ in range(int(line)):
            began = time.perf_counter()
            loss, told = step()
            seconds.append(time.perf_counter() - began)
        out.write(json.dumps({"seconds": seconds, "loss": loss, "memory": peak_memory(), **told}) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
