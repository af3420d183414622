"""A snapshot as a Hugging Face folder: the weights as they were trained, proved by what the folder computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.attention.context import packed_positions
from headrace.attention.dense import DenseContext
from headrace.config import ModelConfig, RopeScaling, require
from headrace.errors import CheckpointError, ConfigError
from headrace.kernels.ops import Ops
from headrace.model.huggingface import load_model, save_model
from headrace.model.transformer import Transformer
from headrace.parallel.regions import regions_of
from headrace.train.snapshots.disk import TOKENIZER
from headrace.train.snapshots.reader import Snapshot, find_snapshot

__all__ = ["export_snapshot"]

LENGTHS = (33, 1, 14)
"""Sequences whose logits must be the same, as far as the model reads."""


def export_snapshot(source: Path, out: Path, ops: Ops, warn: Callable[[str], None] = print) -> Snapshot:
    """Write the model of the snapshot that `source` is, or of the newest one in it, into a new folder `out`.

    The folder is loaded again and must compute the logits of the snapshot, by ==, before it takes its name. Raises
    `CheckpointError` where it does not, and `ConfigError` where `out` has something in it or cannot be written.
    """
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(empty, f"{out} is not an empty folder: give a new one")
    snapshot = find_snapshot(source, warn)
    model = _model_of(snapshot, ops)
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        save_model(model, partial)
        shutil.copytree(snapshot.folder / TOKENIZER, partial, dirs_exist_ok=True)
        if not torch.equal(_logits(model), _logits(load_model(partial, ops))):
            raise CheckpointError(f"{out} would not compute what {snapshot.folder} does: nothing was written")
        partial.replace(out)
    except OSError as error:
        raise ConfigError(f"{error.filename or out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return snapshot


def _model_of(snapshot: Snapshot, ops: Ops) -> Transformer:
    model = Transformer(_config(snapshot.record["model"]), ops).requires_grad_(False)
    snapshot.read(regions_of("model", model.tensors(), model.group), kind="model/")
    return model


def _config(values: Mapping[str, Any]) -> ModelConfig:
    """From what JSON has kept of it."""
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if plain["rope_scaling"] is not None:
        plain["rope_scaling"] = RopeScaling(**plain["rope_scaling"])
    return ModelConfig(**plain)


@torch.no_grad()
def _logits(model: Transformer) -> Tensor:
    """Logits [T, V] of a batch that depends on the model's sizes alone."""
    config, device = model.config, model.ops.device
    lengths = [min(length, config.max_position_embeddings) for length in LENGTHS]
    ids_T = torch.arange(sum(lengths), device=device) * 7919 % config.vocab_size
    return model(ids_T, packed_positions(lengths, device), DenseContext(model.ops, config, lengths))
