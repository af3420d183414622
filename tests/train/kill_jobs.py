"""Snapshots in processes that kill themselves: run as `python -m train.kill_jobs FOLDER`, a line of JSON each."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from headrace.parallel.regions import Region
from headrace.train.snapshots import disk
from headrace.train.snapshots.disk import clear_after
from headrace.train.snapshots.reader import newest_whole
from headrace.train.snapshots.writer import SnapshotWriter

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def regions(step):
    return [(name, Region(torch.full((4, 8), float(step)), (0, 0), (4, 8))) for name in ("model/a", "first/a")]


def write(folder, step):
    def tokenizer(into):
        (into / "tokenizer.json").write_text(str(step))

    with SnapshotWriter(folder, keep=1, tokenizer=tokenizer) as one:
        one.begin({"state": {"step": step}}, regions(step))


def die_at(instant, folder):
    """From here on, count what is done to files in `folder`, and kill this process before that number is done."""
    left = instant

    def one(*_):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, args):
        if event in CHANGES and (str(args[0]).startswith(str(folder)) or "rmdir" in event or "remove" in event):
            one()

    sys.addaudithook(audit)
    fsync = os.fsync

    def counted(descriptor):
        one()
        fsync(descriptor)

    patch.multiple(disk, CHUNK=64, hashlib=Counted(hashlib, one)).start()
    os.fsync = counted


class Counted:
    """hashlib, whose every update tells that so many bytes more have been written."""

    def __init__(self, real, one):
        self._real, self._one = real, one
        self.file_digest = real.file_digest

    def sha256(self, *args):
        digest = self._real.sha256(*args)
        outer = self

        class Digest:
            def update(self, data):
                outer._one()
                digest.update(data)

            hexdigest = digest.hexdigest

        return Digest()


def child(instant, folder):
    pid = os.fork()
    if pid == 0:
        die_at(instant, folder)
        write(folder, 2)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def main(root):
    ended, instant = False, 0
    while not ended:
        folder = root / str(instant)
        write(folder, 1)
        ended = child(instant, folder)
        warnings: list[str] = []
        found = newest_whole(folder, warnings.append)
        assert found is not None
        read = [(name, Region(torch.zeros(4, 8), (0, 0), (4, 8))) for name in ("model/a", "first/a")]
        found.read(read)
        right = all(bool(torch.eq(region.tensor, found.step).all()) for _, region in read)
        clear_after(folder, found.step)
        write(folder, 3)
        whole = newest_whole(folder, print)
        assert whole is not None
        assert [path.name for path in folder.iterdir()] == ["step-00000003"]
        print(
            json.dumps({"ended": ended, "step": found.step, "right": right, "then": whole.step, "warnings": warnings})
        )
        instant += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
