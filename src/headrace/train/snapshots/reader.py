"""Read snapshots: find one, check it, copy this rank's regions out of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from headrace.errors import CheckpointError, ConfigError
from headrace.parallel.agreement import on_all_ranks, on_first_rank
from headrace.parallel.mesh import Mesh
from headrace.parallel.regions import Region, box_at, dtype_name, inside, overlap, volume
from headrace.train.paths import SNAPSHOTS, no_snapshot, require_snapshots
from headrace.train.snapshots.disk import RECORD, VERSION, file_hash, record_hash, snapshots
from headrace.typed import read_json

__all__ = ["Snapshot", "find_snapshot", "newest_whole", "open_snapshot"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot whose files have been checked. `record` is what `SnapshotWriter.begin` was given."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return int(self.record["state"]["step"])

    def require_same(self, record: Mapping[str, Any], section: str, what: str) -> None:
        """Raise `ConfigError` unless this run's `record` agrees in a section: "model", "of another model"."""
        for key, ours in json.loads(json.dumps(record[section])).items():
            theirs = self.record[section].get(key)
            if theirs != ours:
                raise ConfigError(
                    f"the snapshot {self.folder} is {what}: {key}={theirs!r}, this recipe has "
                    f"{key}={ours!r}; change the recipe, or train into another --out"
                )

    def read(self, regions: Iterable[tuple[str, Region]], mesh: Mesh | None = None, kind: str = "") -> None:
        """Fill this rank's regions, reading only their bytes. A collective: every rank calls it.

        All tensors whose name begins with `kind` must be in some rank's regions. Raises `CheckpointError` that names a
        tensor which is missing, has another shape or dtype, or is in no rank's regions.
        """

        def fill() -> list[str]:
            left = {name for name in self.record["tensors"] if name.startswith(kind)}
            files: dict[str, Any] = {}
            for name, region in regions:
                self._fill(name, region, files)
                left.discard(name)
            return sorted(left)

        left = set.intersection(*map(set, on_all_ranks(mesh or Mesh(), fill)))
        if left:
            raise CheckpointError(f"{self.folder} holds {min(left)}, which this run does not have")

    @torch.no_grad()
    def _fill(self, name: str, region: Region, files: dict[str, Any]) -> None:
        stored = self.record["tensors"].get(name)
        if stored is None or tuple(stored["shape"]) != region.shape:
            raise CheckpointError(
                f"{self.folder} does not hold {name} with shape {list(region.shape)}: it is the "
                "snapshot of another model"
            )
        dtype = dtype_name(region.tensor.dtype)
        if stored["dtype"] != dtype:
            raise CheckpointError(
                f"{self.folder} holds {name} in {stored['dtype']}, not {dtype}: it is the snapshot of another model"
            )
        missing = volume(region.box)
        for part in stored["regions"]:
            both = overlap(region.box, box_at(part["start"], part["shape"]))
            if both is None:
                continue
            if part["file"] not in files:
                files[part["file"]] = safetensors.safe_open(self.folder / part["file"], framework="pt", device="cpu")
            read = files[part["file"]].get_slice(part["key"])[inside(both, part["start"])]
            region.tensor[inside(both, region.start)].copy_(read)
            missing -= volume(both)
        if missing:
            raise CheckpointError(f"{self.folder} lacks {missing} elements of {name}")


def open_snapshot(path: Path, mesh: Mesh | None = None) -> Snapshot:
    """A snapshot with every byte checked. A collective: each rank checks some of the files.

    Raises `CheckpointError` that names the file at fault, and `ConfigError` for another version, on every rank.
    """
    mesh, found = mesh or Mesh(), []

    def check() -> None:
        record = _read_record(path / RECORD)
        found.append(record)
        for name in sorted(record["files"])[mesh.rank :: mesh.size]:
            _check(path / name, record["files"][name])

    on_all_ranks(mesh, check)
    return Snapshot(path, found[0])


def newest_whole(folder: Path, warn: Callable[[str], None], mesh: Mesh | None = None) -> Snapshot | None:
    """The newest snapshot that can be read, or None. All ranks skip an unreadable one with a warning."""
    mesh = mesh or Mesh()
    for name in reversed(on_first_rank(mesh, lambda: [path.name for path in snapshots(folder)])):
        try:
            return open_snapshot(folder / name, mesh)
        except CheckpointError as error:
            warn(f"{error}: going back to the snapshot before it")
    return None


def find_snapshot(path: Path, warn: Callable[[str], None]) -> Snapshot:
    """The snapshot at `path`, or the newest readable one in a run's folder or its snapshots folder.

    Raises `CheckpointError` where there is none.
    """
    require_snapshots(path)
    if (path / RECORD).exists():
        return open_snapshot(path)
    inner = path / SNAPSHOTS
    snapshot = newest_whole(inner if inner.is_dir() else path, warn)
    if snapshot is None:
        raise no_snapshot(path)
    return snapshot


def _read_record(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    record = read_json(path)
    version = record.get("version")
    if version != VERSION and isinstance(version, int):
        raise ConfigError(
            f"{path} is of version {version}, and this headrace reads version {VERSION}: continue with the "
            "headrace that wrote it, or train into another --out"
        )
    found = record_hash(record)
    if found != record.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its sha256 is {found}, should be {record.get('sha256')}")
    return record


def _check(path: Path, expected: Mapping[str, Any]) -> None:
    expectation = f"{RECORD} has {expected['size']} bytes with sha256 {expected['sha256']}"
    try:
        found = file_hash(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {expectation}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {expectation}") from None
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged: it has {found['size']} bytes with sha256 {found['sha256']}, {expectation}"
        )
