"""Snapshots: all that a run needs to go on, in a folder that is whole or is not there.

    OUT/snapshots/step-00000100/
        rank-00000-of-00001.safetensors     a rank's weights, masters and moments, by name
        snapshot.json                       the rest, and every file's hash; written last

A folder is written beside its place, its bytes are on the disk before it takes its name, and nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from headrace.errors import CheckpointError, ConfigError
from headrace.model.tensorfiles import read_json, write_tensors

__all__ = ["VERSION", "Snapshot", "clear_after", "newest_whole", "open_snapshot", "prune", "snapshots",
           "write_snapshot"]

VERSION = 1
RECORD = "snapshot.json"
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot whose files have been checked. `record` is what `write_snapshot` was given."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return int(self.record["state"]["step"])

    def require_same(self, record: Mapping[str, Any], sections: Mapping[str, str]) -> None:
        """Raise `ConfigError` unless this run's `record` agrees in `sections`: {"layout": "of another layout"}."""
        for section, what in sections.items():
            for key, ours in _plain(record[section]).items():
                theirs = self.record[section].get(key)
                if theirs != ours:
                    raise ConfigError(f"the snapshot {self.folder} is {what}: {key}={theirs!r}, this run has "
                                      f"{key}={ours!r}; change the recipe, or train into another --out")

    def read(self, tensors: Iterable[tuple[str, Tensor]], rank: int = 0) -> None:
        """Fill `tensors` with what `rank` stored under their names."""
        ranks = len(self.record["files"])
        path = self.folder / _file(rank, ranks)
        with safetensors.safe_open(path, framework="pt", device="cpu") as stored, torch.no_grad():
            left = set(stored.keys())
            for name, tensor in tensors:
                if name not in left or tuple(stored.get_slice(name).get_shape()) != tuple(tensor.shape):
                    raise CheckpointError(f"{path} does not hold {name} with shape {list(tensor.shape)}: it is the "
                                          "snapshot of another model")
                tensor.copy_(stored.get_tensor(name))
                left.discard(name)
        if left:
            raise CheckpointError(f"{path} holds {min(left)}, which this run does not have")


def write_snapshot(folder: Path, record: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]], *, rank: int = 0,
                   ranks: int = 1, barrier: Callable[[], None] = lambda: None, copy: int = 0) -> Path:
    """Write a snapshot of `record["state"]["step"]` into `folder` and return its own folder.

    Every rank calls it, with its own tensors; `barrier` waits for all of them. Rank 0's `record` is kept, and of the
    model's copies, which have the same tensors, copy 0 writes. Raises `OSError` where the disk does not take it; what
    stood there before is then untouched.
    """
    final = folder / f"step-{record['state']['step']:08d}"
    partial = folder / f".{final.name}.partial"
    first = rank == 0 and copy == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        if copy == 0:
            _write_tensors(partial / _file(rank, ranks), tensors)
        barrier()
        if first:
            files = {_file(i, ranks): _hash(partial / _file(i, ranks)) for i in range(ranks)}
            _write_record(partial / RECORD, {"version": VERSION, **record, "files": files})
            _take_name(partial, final)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    barrier()
    return final


def snapshots(folder: Path) -> list[Path]:
    """The folders of all snapshots, oldest first."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def open_snapshot(path: Path) -> Snapshot:
    """A snapshot, every byte of it checked. Raises `CheckpointError` that names the file at fault."""
    record = read_json(path / RECORD)
    if record.get("version") != VERSION:
        raise CheckpointError(f"{path / RECORD} is of version {record.get('version')!r}, not {VERSION}")
    files = record.get("files")
    if not isinstance(files, dict) or not isinstance(record.get("state"), dict):
        raise CheckpointError(f"{path / RECORD} is damaged: it lacks files or state")
    for name, expected in files.items():
        try:
            whole = _hash(path / name) == expected
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from None
        if not whole:
            raise CheckpointError(f"{path / name} is damaged: its bytes are not those that were written")
    return Snapshot(path, record)


def newest_whole(folder: Path, warn: Callable[[str], None]) -> Snapshot | None:
    """The newest snapshot that can be read, or None. Each that cannot is passed over with a warning."""
    for path in reversed(snapshots(folder)):
        try:
            return open_snapshot(path)
        except CheckpointError as error:
            warn(f"{error}: going back to the snapshot before it")
    return None


def clear_after(folder: Path, step: int) -> None:
    """Make room to go on from `step`: what is half written goes, snapshots after it, unreadable, are renamed."""
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path)
    for path in snapshots(folder):
        if _step(path) > step:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`."""
    for path in snapshots(folder)[:-keep]:
        # Its name goes first: what is half removed must not look like a snapshot.
        gone = path.with_name(f".{path.name}.partial")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)


def _write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    try:
        write_tensors(path, tensors, {"format": "pt"})
        _sync(path)
    except safetensors.SafetensorError as error:
        # The library has no class for what the disk says.
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from None


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _take_name(partial: Path, final: Path) -> None:
    _sync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would give them back."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
