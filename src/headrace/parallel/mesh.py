"""`Mesh`: a run's ranks as tensor-parallel groups side by side, each with a copy of the model (Megatron-LM §3).

rank = data · tensor_size + tensor        a tensor group's ranks are neighbours; a data group has one of each
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from headrace.errors import ConfigError
from headrace.parallel.group import RankGroup
from headrace.parallel.rendezvous import connect, roll_call

__all__ = ["Mesh", "launched"]

TIMEOUT = 300.0
"""Seconds to wait for a rank to connect, and for an exchange with it."""


@dataclass(frozen=True)
class Mesh:
    """One rank's two groups."""

    tensor: RankGroup = field(default_factory=RankGroup)
    data: RankGroup = field(default_factory=RankGroup)

    @property
    def rank(self) -> int:
        """Among all ranks of the run."""
        return self.data.rank * self.tensor.size + self.tensor.rank

    @property
    def size(self) -> int:
        """Ranks of the run."""
        return self.data.size * self.tensor.size

    def broadcast(self, data: bytes | None) -> bytes:
        """The `data` of the run's rank 0, on every rank."""
        if self.tensor.rank == 0:
            data = self.data.broadcast(data)
        return self.tensor.broadcast(data)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank, decoded from JSON."""
        lines = json.dumps(value) + "\n"
        for group in (self.tensor, self.data):
            mine = torch.frombuffer(bytearray(lines, "ascii"), dtype=torch.uint8)
            lines = group.all_gather_uneven(mine, "agreement").numpy().tobytes().decode("ascii")
        return [json.loads(line) for line in lines.splitlines()]

    def barrier(self) -> None:
        """Wait for every rank of the run."""
        self.tensor.barrier()
        self.data.barrier()

    def close(self) -> None:
        """Leave both groups."""
        self.tensor.close()
        self.data.close()

    @classmethod
    def meet(
        cls,
        store: Any,
        rank: int,
        size: int,
        tensor: int,
        device: torch.device,
        sequence: bool = False,
        timeout: float = TIMEOUT,
        library: bool = False,
    ) -> Mesh:
        """The mesh of `size` ranks that meet at `store`, `tensor` of them to a model.

        With `library`, the communication library sums over the copies.
        """
        if size % tensor:
            raise ConfigError(f"{size} processes are no multiple of parallel.tensor={tensor}")
        copies = size // tensor
        if copies & (copies - 1):
            raise ConfigError(
                f"{size} processes with parallel.tensor={tensor} are {copies} copies of the model, which "
                "is not a power of two"
            )
        roll_call(dist.PrefixStore("run", store), rank, size, timeout)
        mine, copy = rank % tensor, rank // tensor
        return cls(
            connect(dist.PrefixStore(f"tensor {copy}", store), mine, tensor, device, timeout, sequence)
            if tensor > 1
            else RankGroup(sequence),
            connect(dist.PrefixStore(f"data {mine}", store), copy, copies, device, timeout, library=library)
            if copies > 1
            else RankGroup(),
        )


def launched(
    tensor: int, device: torch.device, sequence: bool = False, timeout: float = TIMEOUT, library: bool = False
) -> Mesh:
    """The mesh of the processes that `headrace train` or torchrun started, or of this process alone. See `Mesh.meet`.

    Raises `ConfigError` if there are fewer than `tensor` processes, or one does not connect.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        if tensor > 1:
            raise ConfigError(
                f"parallel.tensor={tensor} needs as many processes: start them with "
                f"headrace train --processes {tensor} …"
            )
        return Mesh(RankGroup(sequence))
    url = os.environ.get("HEADRACE_RENDEZVOUS", "env://")
    store, rank, size = next(dist.rendezvous(url, int(os.environ["RANK"]), size))
    # A restart uses the same store, and must not read what the ranks before it left there.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Mesh.meet(
        dist.PrefixStore(f"attempt {attempt}", store), rank, size, tensor, device, sequence, timeout, library
    )
