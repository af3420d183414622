"""Files and folders of snapshots. A kill at any instant leaves the last complete snapshot."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "RECORD",
    "TOKENIZER",
    "VERSION",
    "clear_after",
    "file_hash",
    "is_step",
    "naming",
    "prune",
    "record_hash",
    "snapshots",
    "step_folder",
    "sync",
    "take_name",
    "write_file",
    "write_json",
]

VERSION = 2
RECORD, TOKENIZER = "snapshot.json", "tokenizer"
NAME = re.compile(r"step-(\d{8,})")
CHUNK = 1 << 24
"""Bytes written and hashed at a time."""


def snapshots(folder: Path) -> list[Path]:
    """The folders of all snapshots, oldest first."""
    found = [path for path in folder.iterdir() if is_step(path)] if folder.is_dir() else []
    return sorted(found, key=_step)


def step_folder(step: int) -> str:
    """The name of a step's snapshot."""
    return f"step-{step:08d}"


def is_step(path: Path) -> bool:
    """Whether it has the name of a snapshot."""
    return NAME.fullmatch(path.name) is not None


def clear_after(folder: Path, step: int) -> None:
    """Prepare to resume from `step`: remove incomplete snapshots, rename later (unreadable) ones to *.damaged."""
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
        _remove(path)


def take_name(partial: Path, final: Path) -> None:
    """Rename a folder whose files are on the disk to its final name, durably."""
    sync(partial)
    if final.exists():
        _remove(final)
    partial.rename(final)
    sync(final.parent)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file and wait until it is on the disk; returns its sha256 and size. Raises `OSError` that names it."""
    digest, size = hashlib.sha256(), 0
    with naming(path), path.open("wb") as file:
        for part in parts:
            view = memoryview(part)
            for at in range(0, len(view), CHUNK):
                chunk = view[at : at + CHUNK]
                file.write(chunk)
                digest.update(chunk)
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file; it gets its name only when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    write_file(partial, [json.dumps(value, indent=1).encode()])
    with naming(path):
        partial.rename(path)


def file_hash(path: Path) -> dict[str, Any]:
    """The sha256 and size of a file, in the form that `write_file` returns."""
    with naming(path), path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": file.tell()}


def record_hash(record: Mapping[str, Any]) -> str:
    """The sha256 of a record without its own "sha256" field."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Re-raise a failure of the disk as an `OSError` that names the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(error.filename or path)) from None
    except Exception as error:
        # Libraries in Rust (safetensors, tokenizers) raise their own class for a failure of the disk.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def _remove(path: Path) -> None:
    # Rename first: a half-removed folder must not look like a snapshot.
    gone = path.with_name(f".{path.name}.gone.partial")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1
