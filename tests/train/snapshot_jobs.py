"""Snapshots on one rank of a mesh: written, read in another layout, refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors

from headrace.errors import HeadraceError
from headrace.kernels.load import load_ops
from headrace.train.config import load_recipe
from headrace.train.run import train
from headrace.train.snapshots import disk, reader, writer
from headrace.train.snapshots.disk import snapshots
from headrace.train.snapshots.reader import newest_whole
from headrace.train.snapshots.writer import SnapshotWriter
from parallel.model_jobs import digest
from parallel.trainer_jobs import trainer_of


def begin(mesh, trainer, one):
    one.begin({"state": trainer.state(), "layout": {"tensor": mesh.tensor.size}}, trainer.tensors())


def save(mesh, recipe, changes, folder, steps):
    """Some steps, a snapshot, and the losses of some more, which are done while it is written."""
    trainer = trainer_of(mesh, recipe, changes)
    for _ in range(steps):
        trainer.step()
    with SnapshotWriter(Path(folder), mesh) as one:
        begin(mesh, trainer, one)
        curve = []
        for _ in range(3):
            record = trainer.step()
            one.poll()
            curve.append([record.step, record.loss, record.grad_norm])
    return curve


def run(mesh, recipe, changes, out):
    """A whole run."""
    train(load_recipe(recipe, changes), out, ops=load_ops("cpu", threads=1), mesh=mesh)


class Spy:
    """safetensors, counting the bytes that slices give."""

    def __init__(self, real):
        self._real, self.reads = real, []

    def safe_open(self, *args, **options):
        file, outer = self._real.safe_open(*args, **options), self

        class File:
            def get_slice(self, key):
                stored = file.get_slice(key)

                class Slice:
                    def __getitem__(self, at):
                        tensor = stored[at]
                        outer.reads.append(tensor.nbytes)  # a view of the mapped file: pages are read when copied
                        return tensor

                return Slice()

        return File()


def load(mesh, recipe, changes, folder):
    """What a rank holds after reading, by region; bytes read and held; and the losses that follow."""
    trainer = trainer_of(mesh, recipe, [*changes, "train.seed=7"])  # other weights, which must all give way
    for _, region in trainer.tensors():
        region.tensor.fill_(float("nan"))
    spy = Spy(safetensors)
    with patch.object(reader, "safetensors", spy):
        snapshot = newest_whole(Path(folder), print, mesh)
        assert snapshot is not None
        snapshot.read(trainer.tensors(), mesh)
    held = [[name, region.box, digest(region.tensor)] for name, region in trainer.tensors()]
    size = sum(region.tensor.nbytes for _, region in trainer.tensors())
    trainer.restore(dict(snapshot.record["state"]))
    records = [trainer.step() for _ in range(3)]
    return {
        "held": held,
        "read": sum(spy.reads),
        "own": size,
        "state": snapshot.record["state"],
        "curve": [[r.step, r.loss, r.grad_norm] for r in records],
    }


def full(mesh, recipe, changes, folder, rank):
    """What every rank is told when the disk takes nothing from one; and whether the next snapshot is whole."""
    trainer = trainer_of(mesh, recipe, changes)
    said: list[Any] = []

    def refuse(path, parts):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    one = SnapshotWriter(Path(folder), mesh)
    begin(mesh, trainer, one)
    one.finish()
    trainer.steps = 1
    for end in (one.poll, one.finish, lambda: begin(mesh, trainer, one)):
        with patch.object(writer, "write_file", refuse if mesh.rank == rank else disk.write_file):
            try:
                begin(mesh, trainer, one)
                assert one._job is not None
                one._job.thread.join()
                end()
                said.append("nothing")
            except OSError as error:
                said.append([error.errno, Path(error.filename).name])
        mesh.barrier()
        said.append(sorted(path.name for path in Path(folder).iterdir()))
        mesh.barrier()
    begin(mesh, trainer, one)
    one.finish()
    last = newest_whole(Path(folder), print, mesh)
    assert last is not None
    return [*said, last.step]


def no_folder(mesh, recipe, changes, file):
    """Rank 0 alone makes the folder; what it is told, all are."""
    trainer = trainer_of(mesh, recipe, changes)
    try:
        begin(mesh, trainer, SnapshotWriter(Path(file), mesh))
    except OSError as error:
        return error.errno
    return None


def damaged(mesh, folder):
    """The step that ranks take, and what they are warned of."""
    warnings: list[str] = []
    snapshot = newest_whole(Path(folder), warnings.append, mesh)
    return [snapshot.step if snapshot else None, warnings]


def hole(mesh, recipe, changes, folder):
    """A rank keeps one tensor to itself."""
    trainer = trainer_of(mesh, recipe, changes)
    tensors = [item for item in trainer.tensors() if mesh.rank == 0 or item[0] != "second/model.norm.weight"]
    if mesh.rank == 1:
        tensors = [item for item in tensors if not item[0].startswith("first/model.layers.0.mlp.down_proj")]
    try:
        with SnapshotWriter(Path(folder), mesh) as one:
            one.begin({"state": trainer.state()}, tensors)
    except HeadraceError as error:
        return [str(error), len(snapshots(Path(folder)))]
    return None
