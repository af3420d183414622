"""Checkpoint folders in Hugging Face layout: read one into a `Transformer`, write one."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from headrace.config import DTYPES, ModelConfig, one_of
from headrace.errors import CheckpointError
from headrace.kernels.delegate import ServingOps
from headrace.kernels.ops import Ops
from headrace.kernels.training import TrainingOps
from headrace.model.families import config_to_json
from headrace.model.folder import CONFIG, GENERATION, read_config
from headrace.model.tensorfiles import SINGLE, TensorFiles, write_tensors
from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup
from headrace.parallel.pieces import Piece, gathered

__all__ = ["check_weights", "fill_weights", "load_model", "load_weights", "save_model"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FREE = ("architecture", "max_position_embeddings", "bos_token_id", "eos_token_ids", "dtype", "dropout")
"""Fields in which the config.json of new weights may differ from the running model's: no product depends on them."""


def load_model(
    folder: str | os.PathLike[str],
    ops: Ops,
    dtype: str = "auto",
    group: RankGroup | None = None,
    serving: bool = False,
) -> Transformer:
    """The model in a folder, on the ops' device, without gradients; with a `group`, this rank's part of it.

    Matrices keep the dtype they are stored in ("auto"; float32 where they differ) or take `dtype`; norms and
    biases are fp32. Files are mapped and each tensor is copied once, to its place; with `serving`, into the order in
    which the ops read it fastest (`Ops.store`). Raises `CheckpointError`
    naming the file or tensor that is missing, left over, misshapen or broken.
    """
    one_of("dtype", dtype, ("auto", *DTYPES))
    config = read_config(folder)
    files = TensorFiles(Path(folder))
    if dtype == "auto":
        dtype = _stored_dtype(files)
    config = dataclasses.replace(config, dtype=dtype)
    try:
        model = Transformer(config, ServingOps(cast(TrainingOps, ops)) if serving else ops, group=group)
    except RuntimeError as error:
        raise CheckpointError(f"no memory on {ops.device} for the model that {folder} describes") from error
    _fill(model, files)
    return model.requires_grad_(False)


def check_weights(model: Transformer, folder: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` unless the folder holds exactly the tensors of `model`, in their shapes.

    A config.json in it must agree with the model's, except in the fields `FREE`.
    """
    if (Path(folder) / CONFIG).exists():
        _check_same(model.config, read_config(folder))
    _match(_shapes(model), TensorFiles(Path(folder)), model.config.tie_word_embeddings)


def load_weights(model: Transformer, folder: str | os.PathLike[str]) -> None:
    """Fill `model` with the weights in a folder, converted to the model's dtypes."""
    _fill(model, TensorFiles(Path(folder)))


def fill_weights(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Fill `model` from tensors by checkpoint name. Raises `CheckpointError` before any change if one misfits."""
    places = dict(model.tensors())
    for wrong, names in (
        ("is missing", places.keys() - tensors.keys()),
        ("is not in the model", tensors.keys() - places),
    ):
        if names:
            raise CheckpointError(f"{min(names)} {wrong}: give every tensor of the model by its checkpoint name")
    for name, place in places.items():
        if tuple(tensors[name].shape) != place.shape:
            raise CheckpointError(f"{name} has shape {list(tensors[name].shape)}, the model's is {list(place.shape)}")
    with torch.no_grad():
        for name, place in places.items():
            place.fill(tensors[name])


def _fill(model: Transformer, files: TensorFiles) -> None:
    sources = _match(_shapes(model), files, model.config.tie_word_embeddings)
    with torch.no_grad():
        for name, place in model.tensors():
            place.fill(files.tensor(sources[name]))


def _pieces(model: Transformer) -> Iterator[tuple[str, Piece]]:
    """`Transformer.tensors` without opening a part: of divided tensors (ZeRO stage 3) only the shape is valid."""
    return ((name, piece) for prefix, part in model.parts() for name, piece in part.tensors(prefix))


def _shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    return {name: piece.shape for name, piece in _pieces(model)}


def save_model(
    model: Transformer,
    folder: str | os.PathLike[str],
    extra_config: Mapping[str, Any] | None = None,
    writes: bool = True,
) -> None:
    """Write config.json, generation_config.json and model.safetensors, for `transformers` and `load_model`.

    Every rank of the model's group calls it; rank 0 gathers the tensors, one at a time, and writes. Where the model's
    copies divide its weights (ZeRO), every copy calls it and one `writes`. Tensors are stored in the model's dtype,
    except norms and biases that it cannot hold exactly. `extra_config` is added to config.json.
    """
    folder = Path(folder)
    # Norms and biases first: they are few, and their values decide the dtype that they are stored in.
    dtype, pieces = getattr(torch, model.config.dtype), dict(_pieces(model))
    vectors = {name: gathered(piece, model.group) for name, piece in pieces.items() if len(piece.shape) == 1}
    if not writes or model.group.rank:
        for _, piece in model.tensors():
            if len(piece.shape) == 2:
                gathered(piece, model.group)
        return
    stored = {name: _narrow(vector, dtype) for name, vector in vectors.items() if vector is not None}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, piece in model.tensors():
            whole = stored.get(name)
            whole = gathered(piece, model.group) if whole is None else whole
            assert whole is not None  # on rank 0
            yield name, whole

    folder.mkdir(parents=True, exist_ok=True)
    config = {**config_to_json(model.config), **(extra_config or {})}
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
    write_tensors(
        folder / SINGLE,
        {name: (stored[name].dtype if name in stored else dtype, piece.shape) for name, piece in pieces.items()},
        tensors(),
    )
    for name, content in ((CONFIG, config), (GENERATION, generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _stored_dtype(files: TensorFiles) -> str:
    found = {files.dtype(name) for name in files.names() if len(files.shape(name)) == 2}
    return str(found.pop() if len(found) == 1 else torch.float32).removeprefix("torch.")


def _match(shapes: Mapping[str, tuple[int, ...]], files: TensorFiles, tied: bool) -> dict[str, str]:
    """{model tensor: checkpoint tensor to read}, after every check that needs no data."""
    found = files.names()
    sources = {name: name for name in shapes}
    if tied and HEAD in found:
        if EMBEDDING not in found:
            sources[EMBEDDING] = HEAD
        elif not torch.equal(files.tensor(EMBEDDING), files.tensor(HEAD)):
            raise CheckpointError(f"{HEAD} differs from {EMBEDDING}, though {CONFIG} ties them")
        found |= {EMBEDDING}
        found -= {HEAD}
    for wrong, names in (("is missing from", shapes.keys() - found), ("is in", found - shapes.keys())):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            reason = "" if wrong == "is missing from" else f", but {CONFIG} describes a model without it"
            raise CheckpointError(f"{min(names)}{more} {wrong} the checkpoint{reason}")
    for name, expected in shapes.items():
        shape = files.shape(sources[name])
        if shape != expected:
            raise CheckpointError(f"{sources[name]} has shape {list(shape)}, where {CONFIG} makes it {list(expected)}")
        files.dtype(sources[name])
    return sources


def _check_same(running: ModelConfig, other: ModelConfig) -> None:
    for name in (f.name for f in dataclasses.fields(running) if f.name not in FREE):
        ours, theirs = getattr(running, name), getattr(other, name)
        if ours != theirs:
            raise CheckpointError(
                f"{CONFIG} makes {name} {theirs}, and the running model's is {ours}: give weights of the same model"
            )


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
