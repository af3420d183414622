"""What training asks of the process it runs in: its threads and its memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headrace.kernels.ops import Ops

__all__ = ["for_kernels", "keep_memory"]

TRIM, MAPPED = -1, -3
"""glibc's names (malloc.h) for how much free memory goes back to the system, and from what size a block is mapped."""


def keep_memory() -> None:
    """Have malloc keep what a step frees: given back, the next step would get it again page by page, zeroed.

    Only glibc is asked; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM, 1 << 30), mallopt(MAPPED, 32 << 20)


@contextmanager
def for_kernels(ops: Ops) -> Iterator[None]:
    """Torch keeps to the calling thread where the kernels have a pool of their own.

    What is left to torch is small, but the workers that it wakes go on spinning where our own should be computing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if ops.name == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
