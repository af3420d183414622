"""Find a checkpoint folder and read its config.json. Needs no torch, so that a wrong path is an error at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from headrace.config import ModelConfig
from headrace.errors import CheckpointError, ConfigError
from headrace.model.families import config_from_json

__all__ = ["CONFIG", "GENERATION", "check_folder", "read_config", "read_json", "resolve"]

CONFIG = "config.json"
GENERATION = "generation_config.json"
WANTED = ["*.json", "*.safetensors", "*.jinja"]
UNWANTED = ["*/*", "consolidated*"]


def resolve(path_or_id: str | os.PathLike[str]) -> Path:
    """A local checkpoint folder as it is, a hub id ("org/name") as the folder it is downloaded to.

    Raises `CheckpointError` where there is no such folder and the download fails.
    """
    local = _local(path_or_id)
    if local is not None:
        return local
    name = os.fspath(path_or_id)
    import huggingface_hub  # here, because only a download needs it and it takes a while to import

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:  # the hub raises its own errors and those of its transport
        raise CheckpointError(
            f"{name} is no local folder, and the download from the Hugging Face hub failed "
            f"({type(error).__name__}): give the path of a checkpoint folder"
        ) from error


def check_folder(path_or_id: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` for a path that is no folder, or one whose config.json describes no known model.

    A hub id passes: it is looked up when it is loaded.
    """
    local = _local(path_or_id)
    if local is not None:
        read_config(local)


def _local(path_or_id: str | os.PathLike[str]) -> Path | None:
    """The local folder, or None for what may be a hub id."""
    path = Path(os.path.expanduser(path_or_id))
    if path.is_dir():
        return path
    name = os.fspath(path_or_id)
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the folder that holds {CONFIG}")
    if name.startswith((".", "/", "~", os.sep)) or name.count("/") != 1 or not all(name.split("/")):
        raise CheckpointError(f"{name} is neither a folder nor a Hugging Face id such as Qwen/Qwen3-0.6B")
    return None


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The model that a folder's config.json (and generation_config.json, for stop ids) describes.

    Raises `CheckpointError` naming the file and the field.
    """
    path, generation_path = Path(folder) / CONFIG, Path(folder) / GENERATION
    config = read_json(path)
    generation = read_json(generation_path) if generation_path.exists() else {}
    try:
        return config_from_json(config, generation)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: give a folder in Hugging Face layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
