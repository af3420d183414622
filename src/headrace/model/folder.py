"""Find a checkpoint folder and read its config.json. Needs no torch, so that a wrong path is an error at once."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.config import ModelConfig
from headrace.errors import CheckpointError, ConfigError
from headrace.model.families import config_from_json, stop_ids
from headrace.typed import expanded, read_json

__all__ = ["CONFIG", "GENERATION", "check_folder", "read_config", "resolve"]

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
    """Raise `CheckpointError` if the path is not a folder, or if its config.json describes no known model.

    A hub id passes: it is looked up when it is loaded.
    """
    local = _local(path_or_id)
    if local is not None:
        read_config(local)


def _local(path_or_id: str | os.PathLike[str]) -> Path | None:
    """The local folder, or None for what may be a hub id."""
    path = expanded(path_or_id)
    if os.path.isdir(path):  # False, not an error, for a name that is too long
        return path
    name = os.fspath(path_or_id)
    if path.suffix.lower() == ".gguf":
        raise _gguf(path)
    if os.path.exists(path):
        raise CheckpointError(f"{name} is a file: give the folder that holds {CONFIG}")
    if name.startswith((".", "/", "~", os.sep)) or name.count("/") != 1 or not all(name.split("/")):
        raise CheckpointError(f"{name} is neither a folder nor a Hugging Face id such as Qwen/Qwen3-0.6B")
    return None


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The model that a folder's config.json (and generation_config.json, for stop ids) describes.

    Raises `CheckpointError` naming the file and the field.
    """
    path, generation_path = Path(folder) / CONFIG, Path(folder) / GENERATION
    if not path.exists() and (found := sorted(Path(folder).glob("*.gguf"))):
        raise _gguf(found[0])
    config = read_json(path)
    generation = read_json(generation_path) if generation_path.exists() else {}
    try:
        stop_ids(generation)
    except CheckpointError as error:
        raise CheckpointError(f"{generation_path}: {error}") from None
    try:
        return config_from_json(config, generation)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _gguf(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file}: GGUF is not read: give the model's original folder, or convert the file with transformers, "
        "AutoModelForCausalLM.from_pretrained(folder, gguf_file=file).save_pretrained(out), and AutoTokenizer likewise"
    )
