"""The metrics of every step: metrics.jsonl and TensorBoard's event file."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["Events", "MetricsFile", "memory_bytes", "read_metrics"]


class MetricsFile:
    """metrics.jsonl, opened for appending. Lines of steps after `step`, from an interrupted run, are removed."""

    def __init__(self, path: Path, step: int) -> None:
        kept = "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(kept)
            _settle(file)
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one step, and flush it, so that readers see whole lines."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        _settle(self._file)

    def close(self) -> None:
        """End it."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without an incomplete last one; empty where there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or "step" not in line:
            break
        lines.append(line)
    return lines


class Events:
    """TensorBoard's event file. Its first event makes TensorBoard drop earlier files' steps after `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        # Here, because it takes a while to import.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._event = Event
        name = f"events.out.tfevents.{int(time.time()):010d}.{step:08d}.{os.getpid()}"
        self._writer = RecordWriter(str(folder / name))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, line: Mapping[str, Any]) -> None:
        """One step: each number of a line of metrics.jsonl under its name."""
        event = self._event(wall_time=time.time(), step=line["step"])
        for name, value in line.items():
            if name != "step" and value is not None:
                event.summary.value.add(tag=name, simple_value=float(value))
        self._add(event)

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """End it."""
        self._writer.close()

    def _add(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def memory_bytes(device: torch.device) -> int:
    """Resident memory of this process; on a GPU the peak of its allocations."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _settle(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
