"""How ranks find each other through a store that one of them keeps, to connect by sockets or a process group."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from headrace.errors import ConfigError
from headrace.parallel.group import DistributedGroup
from headrace.parallel.library import LibraryGroup
from headrace.parallel.links import Link, ProcessGroupLink, SocketLink

__all__ = ["LOOPBACK", "connect", "join", "keep_store", "roll_call"]

LOOPBACK = "127.0.0.1"
STORE = 10.0
"""Seconds that the store itself may take to answer, however short the timeout for ranks."""


def keep_store(size: int, timeout: float, port: int = 0) -> dist.TCPStore:
    """A store on the loopback, at a free port if 0, for `size` ranks of this machine. Rank 0 keeps it."""
    wait = timedelta(seconds=max(timeout, STORE))
    return dist.TCPStore(LOOPBACK, port, size, is_master=True, timeout=wait, wait_for_workers=False)


def join(port: int, size: int, timeout: float) -> dist.TCPStore:
    """The store that another rank keeps at `port`."""
    return dist.TCPStore(LOOPBACK, port, size, is_master=False, timeout=timedelta(seconds=max(timeout, STORE)))


def connect(
    store: Any,
    rank: int,
    size: int,
    device: torch.device,
    timeout: float,
    sequence: bool = False,
    link: str = "auto",
    library: bool = False,
) -> DistributedGroup:
    """The group of `size` ranks that connect through `store`. `link` is "socket", "gloo", "nccl" or "auto".

    With `library` it is a torch process group, which also takes the sums of divided tensors.

    Raises `ConfigError` naming the ranks that have not registered within `timeout` seconds, which also bounds every
    later exchange.
    """
    near = roll_call(store, rank, size, timeout)
    if link == "auto":
        link = "nccl" if device.type == "cuda" else "socket" if near and not library else "gloo"
    made: Link = (
        SocketLink.meet(store, rank, size, timeout)
        if link == "socket"
        else ProcessGroupLink(store, rank, size, device, timeout, LOOPBACK if near else socket.gethostname())
    )
    return (LibraryGroup if library else DistributedGroup)(made, rank, size, sequence)


def roll_call(store: Any, rank: int, size: int, timeout: float) -> bool:
    """Wait for every rank, and return whether all are on one machine.

    Raises `ConfigError` naming ranks that have not registered within `timeout` seconds.
    """
    wait = timedelta(seconds=timeout)
    store.set(f"here/{rank}", socket.gethostname())
    missing = [i for i in range(size) if not _came(store, f"here/{i}", wait)]
    if missing:
        names = " and ".join(str(i) for i in missing)
        raise ConfigError(
            f"rank {names} of {size} did not come within {timeout:g} s: see whether its process started, "
            "and what it said"
        )
    return len({store.get(f"here/{i}") for i in range(size)}) == 1


def _came(store: Any, key: str, wait: timedelta) -> bool:
    try:
        store.wait([key], wait)
    except (RuntimeError, dist.DistStoreError):
        return False
    return True
