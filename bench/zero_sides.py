"""The sides of the ZeRO comparison, each rank in its own process, with one thread.

    python bench/zero_sides.py KIND FOLDER DTYPE RANK SIZE PORT

KIND is headrace:STAGE, headrace:STAGE:still (without overlap), snapshots:STAGE, ddp, fsdp (FSDP2, a group for every
layer and one for the rest) or deepspeed:STAGE. FOLDER holds the first weights, our recipe, and for the peers
batches.pt: the rows that our trainer reads, in its order, with the number of targets. On all sides the loss is the sum
over a batch's targets divided by their number, and AdamW has our recipe's settings.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sides import Step, gloo, serve, trainer

RATE, DECAY, CLIP = 1e-4, 0.1, 1.0
STEPS, EVERY = 30, 6
"""Steps of the run with snapshots, which writes one after every sixth."""


def headrace(stage: str, folder: Path, dtype: str, rank: int, size: int, port: int, still: bool = False) -> Step:
    """Our trainer at a stage."""
    return trainer(
        folder / "recipe.toml",
        [f"parallel.zero={stage}", f"parallel.overlap={str(not still).lower()}", f"model.dtype={dtype}"],
        1,
        1,
        rank,
        size,
        port,
    )


def snapshots(stage: str, folder: Path, dtype: str, rank: int, size: int, port: int) -> Step:
    """Whole runs: the cost of a snapshot to a run, and the time to resume from one."""
    from headrace.kernels.load import load_ops
    from headrace.parallel.mesh import launched
    from headrace.train.config import load_recipe
    from headrace.train.run import train

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    mesh, ops = launched(1, torch.device("cpu")), load_ops("cpu", threads=1)
    torch.set_num_threads(1)
    home = tempfile.TemporaryDirectory(prefix="headrace-") if rank == 0 else None
    out = mesh.broadcast(home.name.encode() if home is not None else None).decode()
    runs = 0

    def run(steps: int, resume: bool) -> tuple[list[float], float]:
        """(times of the beginning and of every step's end, the last loss)."""
        times = [time.perf_counter()]

        def note(line: Mapping[str, Any]) -> None:
            times.append(time.perf_counter())

        recipe = load_recipe(
            folder / "recipe.toml",
            [
                f"parallel.zero={stage}",
                f"train.steps={steps}",
                f"train.snapshot_every={EVERY}",
                f"model.dtype={dtype}",
                "train.validation_sequences=1",
                "train.peak_flops=1e12",
            ],
        )
        done = train(recipe, f"{out}/{runs}", note, ops=ops, mesh=mesh, resume=resume, warn=lambda _: None)
        return times, done.final_loss

    def step() -> tuple[float, dict[str, Any]]:
        nonlocal runs
        run(1, False)  # load the kernels before the measured runs
        runs += 1
        times, _ = run(STEPS, False)
        again, loss = run(STEPS + 1, True)
        if home is None:
            return loss, {}
        lasted = [b - a for a, b in zip(times[1:], times[2:])]  # the first step warms up
        rounds = [lasted[i : i + EVERY] for i in range(EVERY - 1, len(lasted) - EVERY + 1, EVERY)]
        usual = statistics.median(x for one in rounds for x in one[EVERY // 2 :])
        return loss, {
            "step": usual,
            "snapshot": statistics.median(sum(one) - EVERY * usual for one in rounds),
            "begin": times[1] - times[0] - usual,
            "resume": again[1] - again[0] - usual,
        }

    return step


def ddp(folder: Path, dtype: str, rank: int, size: int, port: int) -> Step:
    """torch's data parallelism, with gradients in the buckets' memory."""
    gloo(rank, size, port)
    model = _model(folder, dtype)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _torch_step(folder, wrapped, _adamw(model), rank, size)


def fsdp(folder: Path, dtype: str, rank: int, size: int, port: int) -> Step:
    """FSDP2: parameters in fp32, gathered and reduced in `dtype`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    gloo(rank, size, port)
    model = _model(folder, "float32")
    narrow = getattr(torch, dtype)
    how: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (size,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=narrow),
    }
    for layer in model.model.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    return _torch_step(folder, model, _adamw(model), rank, size)


def deepspeed(stage: str, folder: Path, dtype: str, rank: int, size: int, port: int) -> Step:
    """DeepSpeed's engine at a stage."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable(logging.WARNING)
    gloo(rank, size, port)
    import deepspeed as peer

    peer.init_distributed("gloo")
    model = _model(folder, dtype)
    engine, *_ = peer.initialize(
        model=model,
        optimizer=_adamw(model),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": int(stage)},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "bf16": {"enabled": dtype == "bfloat16"},
        },
    )
    loss_of = _losses(folder, rank, size)

    def step() -> tuple[float, dict[str, Any]]:
        loss = loss_of(engine)
        engine.backward(loss)
        engine.step()
        return float(loss.detach()), {"deepspeed": peer.__version__, "transformers": version("transformers")}

    return step


def _model(folder: Path, dtype: str) -> Any:
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's, of torch's newer names
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).train()


def _adamw(model: Any) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )


def _losses(folder: Path, rank: int, size: int) -> Callable[[Any], torch.Tensor]:
    """The next batch's loss on this rank; gradients are those of the mean over the ranks."""
    batches = iter(torch.load(folder / "batches.pt"))

    def loss_of(model: Any) -> torch.Tensor:
        ids, targets, count = next(batches)
        logits = model(input_ids=ids[rank::size], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets[rank::size].flatten(), reduction="sum"
        ) * (size / count)

    return loss_of


def _torch_step(folder: Path, model: Any, optimizer: torch.optim.AdamW, rank: int, size: int) -> Step:
    loss_of = _losses(folder, rank, size)

    def step() -> tuple[float, dict[str, Any]]:
        loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()), {"transformers": version("transformers")}

    return step


def main() -> None:
    """Serve one rank of one side."""
    kind, folder, dtype, *numbers = sys.argv[1:]
    name, *options = kind.split(":")
    makers: dict[str, Callable[..., Step]] = {
        "headrace": headrace,
        "snapshots": snapshots,
        "ddp": ddp,
        "fsdp": fsdp,
        "deepspeed": deepspeed,
    }
    still = {"still": True} if "still" in options else {}
    serve(partial(makers[name], *options[:1], Path(folder), dtype, *map(int, numbers), **still))


if __name__ == "__main__":
    main()
