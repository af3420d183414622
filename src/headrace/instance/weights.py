"""Install weights from a folder into a running engine, and again into a restarted one."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.errors import CheckpointError
from headrace.instance.wire import InstalledWeights
from headrace.llm.llm import LLM

__all__ = ["install", "reinstall"]


def install(llm: LLM, folder: str, version: int | None) -> InstalledWeights:
    """`LLM.update_weights` from a folder on this machine, never from a hub.

    After a `CheckpointError` nothing has changed; after any other error the engine cannot run another step.
    """
    folder, before = _resolve(folder)
    weights = InstalledWeights(folder, llm.update_weights(folder, version), before)
    if _resolve(folder)[1] != before:
        raise RuntimeError(_changed(weights, "were read"))
    return weights


def reinstall(llm: LLM, weights: InstalledWeights) -> None:
    """Install weights in a restarted engine. `CheckpointError` if the files have changed: tokens could differ."""
    if _resolve(weights.folder)[1] != weights.files:
        raise CheckpointError(_changed(weights, "were put in"))
    install(llm, weights.folder, weights.version)


def _changed(weights: InstalledWeights, when: str) -> str:
    return (
        f"the weights of version {weights.version} in {weights.folder} have changed since they {when}: give every "
        "version a folder of its own, and keep it until the next one is in"
    )


def _resolve(folder: str) -> tuple[str, list[tuple[str, int, int]]]:
    """The folder with symbolic links resolved, since they may change later, and `InstalledWeights.files`."""
    try:
        place = Path(os.path.realpath(folder))
        if not place.is_dir():
            raise CheckpointError(f"{folder} is no folder on this machine: give one in Hugging Face layout")
        found = sorted(path for path in place.iterdir() if ".safetensors" in path.name)
        stats = [(path.name, path.stat()) for path in found]
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # not a valid path, or no permission
        raise CheckpointError(f"{folder[:200]!r} cannot be read: {error}") from error
    return str(place), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
