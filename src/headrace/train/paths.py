"""Checks of the folders that a command reads and writes. They need no torch: a wrong one is an error at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

from headrace.config import require
from headrace.errors import CheckpointError
from headrace.train.snapshots.disk import RECORD, is_step, snapshots

__all__ = ["METRICS", "SNAPSHOTS", "begin", "goes_on", "no_snapshot", "require_empty", "require_snapshots"]

METRICS, SNAPSHOTS, RUN = "metrics.jsonl", "snapshots", "run.json"


def begin(out: Path, resume: bool) -> bool:
    """Whether to resume the run in `out`; writes the launcher's name into run.json."""
    resume = goes_on(out, resume)
    out.mkdir(parents=True, exist_ok=True)
    (out / RUN).write_text(json.dumps({"launcher": _launcher()}) + "\n", encoding="utf-8")
    return resume


def goes_on(out: Path, resume: bool) -> bool:
    """Whether to resume the run in `out`. Raises `ConfigError` where there is one and `resume` is False."""
    require(not out.exists() or out.is_dir(), f"--out {out} is a file: name a folder")
    metrics = out / METRICS
    measured = metrics.exists() and metrics.stat().st_size > 0
    if not measured and not any((out / name).exists() for name in (SNAPSHOTS, "hf")):
        return False  # a run that ended before its first step left nothing to resume
    require(resume or _restarted(out), f"{out} holds a run: continue it with --resume, or give another --out")
    return True


def require_empty(out: Path) -> None:
    """Raise `ConfigError` unless `out` is absent or an empty folder."""
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(empty, f"{out} is not an empty folder: give a new one")


def require_snapshots(path: Path) -> None:
    """Raise `CheckpointError` unless `path` is a snapshot, or a run's folder or snapshots folder that has one."""
    if is_step(path) or (path / RECORD).exists():
        if not (path / RECORD).exists():
            raise CheckpointError(f"{path / RECORD} is missing")
    elif not snapshots(inner if (inner := path / SNAPSHOTS).is_dir() else path):
        raise no_snapshot(path)


def no_snapshot(path: Path) -> CheckpointError:
    """The error for a folder without a snapshot that can be read."""
    return CheckpointError(
        f"{path} holds no whole snapshot: give a step-… folder, the folder of snapshots, or the "
        "--out of a run that has written one"
    )


def _restarted(out: Path) -> bool:
    """Whether torchrun restarted this process, and the same torchrun began the run."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    try:
        return bool(json.loads((out / RUN).read_text(encoding="utf-8"))["launcher"] == _launcher())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _launcher() -> str:
    """An identity of the parent torchrun, the same for all processes and restarts under it."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}:{os.getppid()}"
