"""Write snapshots while training goes on.

`begin` copies this rank's regions; a thread writes them, then a small report file. When every rank's report is there,
rank 0 merges them into snapshot.json and renames the folder. The thread runs no collectives; the caller's thread does.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from headrace.errors import CheckpointError, HeadraceError
from headrace.parallel.agreement import on_all_ranks, on_first_rank
from headrace.parallel.mesh import Mesh
from headrace.parallel.regions import Region, box_at, dtype_name, require_whole
from headrace.train.snapshots.disk import (
    RECORD,
    TOKENIZER,
    VERSION,
    file_hash,
    naming,
    prune,
    record_hash,
    step_folder,
    sync,
    take_name,
    write_file,
    write_json,
)
from headrace.train.snapshots.staging import Staged, Staging

__all__ = ["SnapshotWriter"]


@dataclass(slots=True)
class _SnapshotJob:
    """A snapshot that is being written."""

    partial: Path
    final: Path
    record: Mapping[str, Any]
    tensors: Mapping[str, Any]
    """dtype and whole shape of every tensor of which this rank holds a part, written by it or not."""
    thread: threading.Thread = field(default_factory=threading.Thread)
    error: Exception | None = None

    def state(self) -> str:
        """The state of this rank's part: writing, failed or written."""
        return "writing" if self.thread.is_alive() else "failed" if self.error else "written"

    def require_written(self) -> None:
        """Raise the thread's error, if there is one."""
        if self.error is not None:
            raise self.error


class SnapshotWriter:
    """Every rank has one and calls it at the same steps. It writes one snapshot at a time.

    A failed write is raised as `OSError` by the next `poll`, `begin` or `finish`, on every rank, and the incomplete
    folder is removed. As a context manager it finishes the last snapshot; after an exception, only if that needs no
    collective.
    """

    def __init__(
        self, folder: Path, mesh: Mesh | None = None, *, keep: int = 2, tokenizer: Callable[[Path], None] | None = None
    ) -> None:
        """`keep`: how many of the newest snapshots to keep. `tokenizer` saves the tokenizer into a folder."""
        self._folder = folder
        self._mesh = mesh = mesh or Mesh()
        self._keep = keep
        self._tokenizer = tokenizer
        self._staging = Staging()
        self._job: _SnapshotJob | None = None

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._settle()

    def begin(self, record: Mapping[str, Any], regions: Iterable[tuple[str, Region]]) -> None:
        """Copy the regions and start writing; they may change as soon as this returns.

        Rank 0's `record` is kept; its state.step gives the folder its name. It finishes an earlier snapshot first.
        """
        self.finish()
        held = [(name, region) for name, region in regions if region.tensor.numel()]
        final = self._folder / step_folder(record["state"]["step"])
        job = _SnapshotJob(
            final.with_name(f".{final.name}.partial"),
            final,
            json.loads(json.dumps(record)),
            {name: {"dtype": dtype_name(region.tensor.dtype), "shape": region.shape} for name, region in held},
        )
        on_first_rank(self._mesh, lambda: _make_empty(job.partial))
        staged = self._staging.fill(held)
        # A daemon, so that the process can end while a disk hangs.
        job.thread = threading.Thread(target=self._write, args=(job, staged), name="snapshot", daemon=True)
        self._job = job
        job.thread.start()

    def poll(self) -> None:
        """Finish the snapshot if all ranks have written their parts. Exchanges a few bytes between ranks."""
        if self._job is not None:
            states = set(self._mesh.all_gather_object(self._job.state()))
            if "failed" in states or states == {"written"}:
                self.finish()

    def finish(self) -> None:
        """Wait until the snapshot that is being written, if there is one, is complete.

        Raises `CheckpointError` that names a tensor whose elements are not each in just one rank's regions.
        """
        if self._job is None:
            return
        job, self._job = self._job, None
        job.thread.join()
        try:
            on_all_ranks(self._mesh, job.require_written)
            on_first_rank(self._mesh, lambda: self._seal(job))
        except (OSError, HeadraceError):
            if self._mesh.rank == 0:
                shutil.rmtree(job.partial, ignore_errors=True)
            raise

    def _settle(self) -> None:
        """`finish` without collectives, as other ranks may be gone: their report files show that they have written."""
        if self._job is None:
            return
        job, self._job = self._job, None
        job.thread.join()
        if self._mesh.rank == 0 and all((job.partial / self._report(i)).exists() for i in range(self._mesh.size)):
            with contextlib.suppress(OSError, HeadraceError):  # the exception that ends the run is the one to report
                self._seal(job)

    # ---- this rank's part, in the thread

    def _write(self, job: _SnapshotJob, staged: list[Staged]) -> None:
        mesh = self._mesh
        file = f"{_rank(mesh.rank, mesh.size)}.safetensors"
        try:
            files = {file: write_file(job.partial / file, self._staging.file(staged))} if staged else {}
            if mesh.rank == 0 and self._tokenizer is not None:
                files |= self._write_tokenizer(job.partial, self._tokenizer)
            write_json(
                job.partial / self._report(mesh.rank),
                {
                    "files": files,
                    "tensors": job.tensors,
                    "regions": [(one.name, {"file": file, **one.record()}) for one in staged],
                },
            )
        except Exception as error:
            job.error = error

    def _write_tokenizer(self, partial: Path, save: Callable[[Path], None]) -> dict[str, Any]:
        folder = partial / TOKENIZER
        with naming(folder):
            folder.mkdir()
            save(folder)
        files = sorted(folder.iterdir())
        for path in (*files, folder):
            sync(path)
        return {f"{TOKENIZER}/{path.name}": file_hash(path) for path in files}

    # ---- rank 0's

    def _seal(self, job: _SnapshotJob) -> None:
        """Merge the ranks' reports into snapshot.json and rename the folder."""
        reports = [job.partial / self._report(i) for i in range(self._mesh.size)]
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in reports]
        record: dict[str, Any] = {
            "version": VERSION,
            **job.record,
            "files": {name: entry for part in parts for name, entry in part["files"].items()},
            "tensors": _merged(parts),
        }
        write_json(job.partial / RECORD, {**record, "sha256": record_hash(record)})
        for path in reports:
            path.unlink()
        take_name(job.partial, job.final)
        prune(self._folder, self._keep)

    def _report(self, rank: int) -> str:
        return f"{_rank(rank, self._mesh.size)}.json"


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _rank(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}-of-{ranks:05d}"


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{name: dtype, shape, regions} from all reports. Raises `CheckpointError` unless each tensor is complete."""
    tensors: dict[str, Any] = {}
    for name, entry in (item for part in parts for item in part["tensors"].items()):
        known = tensors.setdefault(name, {**entry, "regions": []})
        if (known["dtype"], known["shape"]) != (entry["dtype"], entry["shape"]):
            raise CheckpointError(
                f"{name} is {known['dtype']} {known['shape']} on one rank and {entry['dtype']} "
                f"{entry['shape']} on another"
            )
    for name, region in (item for part in parts for item in part["regions"]):
        tensors[name]["regions"].append(region)
    for name, tensor in tensors.items():
        require_whole(name, tuple(tensor["shape"]), [box_at(r["start"], r["shape"]) for r in tensor["regions"]])
    return tensors
