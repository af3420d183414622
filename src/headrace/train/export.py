"""Export a snapshot as a Hugging Face folder, and check that the folder computes the same logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.attention.context import packed_positions
from headrace.attention.dense import DenseContext
from headrace.config import ModelConfig, RopeScaling
from headrace.errors import CheckpointError, ConfigError
from headrace.kernels.ops import Ops
from headrace.model.huggingface import load_model, save_model
from headrace.model.transformer import Transformer
from headrace.parallel.regions import regions_of
from headrace.train.paths import require_empty
from headrace.train.snapshots.disk import TOKENIZER
from headrace.train.snapshots.reader import Snapshot, find_snapshot

__all__ = ["export_snapshot"]

LENGTHS = (33, 1, 14)
"""Lengths of the sequences whose logits are compared, cut to what the model can read."""


def export_snapshot(source: Path, out: Path, ops: Ops, warn: Callable[[str], None] = print) -> Snapshot:
    """Write the model of the snapshot at `source`, or of the newest one in that folder, into a new folder `out`.

    The written folder is loaded and its logits compared with the snapshot's, by ==, before it is renamed to `out`.
    Raises `CheckpointError` where they differ, and `ConfigError` where `out` is not empty or cannot be written.
    """
    require_empty(out)
    snapshot = find_snapshot(source, warn)
    model = _model_of(snapshot, ops)
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        save_model(model, partial)
        shutil.copytree(snapshot.folder / TOKENIZER, partial, dirs_exist_ok=True)
        if not torch.equal(_logits(model), _logits(load_model(partial, ops))):
            raise CheckpointError(f"{out} would compute other logits than {snapshot.folder}: nothing was written")
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
    """The `ModelConfig` in a snapshot's JSON record."""
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
    logits_TV: Tensor = model(ids_T, packed_positions(lengths, device), DenseContext(model.ops, config, lengths))
    return logits_TV
