"""Process settings for training: malloc and torch's threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headrace.kernels.ops import Ops

__all__ = ["for_kernels", "keep_memory"]

TRIM, MAPPED = -1, -3
"""mallopt parameters in glibc's malloc.h: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD."""


def keep_memory() -> None:
    """Make glibc's malloc keep freed memory: otherwise every step gets it back page by page, zeroed.

    No effect with another libc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM, 1 << 30), mallopt(MAPPED, 32 << 20)


@contextmanager
def for_kernels(ops: Ops) -> Iterator[None]:
    """Restrict torch to one thread while the CPU kernels run on their own pool.

    Torch's share of the work is small, but its workers would spin on the cores that the kernels need.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if ops.name == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
