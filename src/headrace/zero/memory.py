"""Memory for ZeRO: reusable buffers (ZeRO-R's M_D), and states outside of the device's memory."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from headrace.errors import ConfigError

__all__ = ["Arena", "Host"]


class Arena:
    """A pool of flat buffers of one dtype and length. It allocates one when none is free, and keeps it.

    So the buffers of a step do not fragment memory.
    """

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.elements, self._dtype, self._device = elements, dtype, device
        self._free: list[Tensor] = []
        self.count = 0
        """Buffers allocated."""

    def take(self) -> Tensor:
        """A buffer with arbitrary content."""
        if self._free:
            return self._free.pop()
        self.count += 1
        return torch.empty(self.elements, dtype=self._dtype, device=self._device)

    def put_back(self, buffer: Tensor) -> None:
        """Return a buffer to the pool."""
        self._free.append(buffer)

    @property
    def nbytes(self) -> int:
        """Bytes of all its buffers, free or not."""
        return self.count * self.elements * self._dtype.itemsize


class Host:
    """Memory outside of the device: pinned host memory for a GPU, an unnamed mapped file for the CPU.

    The operating system removes the file when the process ends.
    """

    def __init__(self, device: torch.device, folder: str) -> None:
        """`folder`: where the file is made."""
        self._device, self._folder = device, folder
        self.nbytes = 0
        """Bytes allocated."""

    def zeros(self, elements: int) -> Tensor:
        """fp32 zeros [elements]. Raises `ConfigError` where the folder cannot hold them."""
        size = elements * torch.float32.itemsize
        self.nbytes += size
        if self._device.type == "cuda":
            return torch.zeros(elements, pin_memory=True)
        if not size:
            return torch.zeros(0)
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                # Blocks are claimed now: a full disk found at a write to mapped memory would kill the process.
                os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_file(file.name, shared=True, size=elements)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"{Path(self._folder)} cannot hold {math.ceil(size / 2**20)} MiB of offloaded state: "
                f"{error}; set parallel.offload_folder to a folder with room"
            ) from None
