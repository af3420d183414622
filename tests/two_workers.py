"""How the workers of `make test` (pytest-xdist) share the work: whole modules, the longest first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["compile_kernels", "in_order", "once", "scheduler"]

POOL = (
    "tests/zero/",
    "tests/parallel/",
    "tests/train/test_snapshot_layouts.py",
    "tests/train/test_plan.py",
    "tests/train/test_one_recipe.py",
    "tests/train/test_export.py",
)
"""One unit: they share a pool of ranks (`parallel.rank_kit`), six processes that are started once."""
FIRST = (
    "tests/train/test_zero_runs.py",
    *POOL,
    "tests/train/test_torchrun.py",
    "tests/train/test_snapshot.py",
    "tests/invariance/test_matrix.py",
    "tests/serve/test_hostile.py",
    "tests/serve/test_server_life.py",
    "tests/reproduce/",
    "tests/kernels/test_linear",
    "tests/cli/",
    "tests/invariance/",
    "tests/serve/",
    "tests/train/",
    "tests/bench/",
    "tests/kernels/",
)
"""The longest units come first, so that at the end no worker is left with a long one."""


def in_order(items: list[pytest.Item]) -> None:
    """Move what starts with a name of `FIRST` to the front; everything else stays in its order."""

    def place(item: pytest.Item) -> int:
        return next((i for i, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST))

    items.sort(key=place)


def scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker that is done takes the next unit, in the order of the tests: a module, or all of `POOL`."""
    from xdist.scheduler import LoadFileScheduling

    class LongestFirst(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return POOL[0] if nodeid.startswith(POOL) else super()._split_scope(nodeid)

    config.option.loadscopereorder = False  # it would put the modules with the most tests first
    return LongestFirst(config, log)


def compile_kernels(worker: str) -> None:
    """Compile what most tests need, before the first of them: two workers meet in the middle of the list."""
    import torch

    from headrace.kernels.cpu import CpuOps
    from headrace.kernels.cpu.warmup import warm_up_steps

    steps = warm_up_steps(CpuOps(), torch.float32, torch.float32, training=True, one_call=True)
    for _, run in steps if worker == "gw0" else reversed(steps):
        run()


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` has filled, in the first worker that asks for it; the others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = folder.with_suffix(".made")
            make(made)
            made.rename(folder)
    return folder
