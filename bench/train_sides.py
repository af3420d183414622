"""The sides of the training comparison, each rank in its own process.

    python bench/train_sides.py KIND FOLDER DATA ROWS TOKENS THREADS RANK SIZE PORT

KIND is headrace, torch, compile or dtensor (torch's own tensor parallelism).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sides import Step, gloo, laid_out, serve, trainer

RATE = 1e-4


def headrace(folder: str, data: str, rows: int, tokens: int, threads: int, rank: int, size: int, port: int) -> Step:
    """Our trainer, from the weights in `folder`."""
    return trainer(
        Path(folder) / "recipe.toml",
        [f"model.init={folder}", f"data.source={data}", f"train.batch_size={rows}", f"train.seq_length={tokens}"],
        threads,
        size,
        rank,
        size,
        port,
    )


def torch_side(
    kind: str, folder: str, data: str, rows: int, tokens: int, threads: int, rank: int, size: int, port: int
) -> Step:
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
        ids, targets, _ = laid_out(stream.next(), rows, tokens)
        logits = call(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
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
    """`clip_grad_norm_` for a mix of DTensor and plain gradients, which torch's does not take."""
    norms = [parameter.grad.norm() for parameter in parameters]
    whole = torch.stack([norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]).norm()
    for parameter in parameters:
        parameter.grad.mul_(min(1.0, 1.0 / float(whole)))


def _split(model: Any, rank: int, size: int, port: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    gloo(rank, size, port)
    plan: dict[str, ParallelStyle] = {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
        plan[f"{name}_proj"] = ColwiseParallel()
    mesh = init_device_mesh("cpu", (size,))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)


def main() -> None:
    """Serve one rank of one side."""
    kind, folder, data, *numbers = sys.argv[1:]
    make = headrace if kind == "headrace" else partial(torch_side, kind)
    serve(lambda: make(folder, data, *map(int, numbers)))


if __name__ == "__main__":
    main()
