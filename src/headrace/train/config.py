"""Recipes: TOML files with the model, the data and the settings of a training run. Unknown keys are errors."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from headrace.config import DTYPES, ModelConfig, require
from headrace.errors import CheckpointError, ConfigError
from headrace.model.families import FAMILIES
from headrace.model.folder import read_config, resolve
from headrace.train.corpus.index import read_index
from headrace.train.recipes import find_recipe
from headrace.typed import (
    Amount,
    Bounds,
    Fraction,
    Natural,
    OneOf,
    PathText,
    PositiveInteger,
    PositiveNumber,
    check,
    field_types,
    nearest,
    printable,
    read_fields,
    read_value,
)

__all__ = ["DataConfig", "OptimizerConfig", "ParallelConfig", "Recipe", "TrainConfig", "load_recipe", "recipe_keys"]

SCHEDULES = ("cosine", "wsd")
RECOMPUTE = ("none", "selective", "full")
REDUCTIONS = ("tree", "library")
REDUCE_EVERY = ("micro_step", "step")
SHUFFLES = ("documents", "pieces")
WEEK = 604800
KERNELS = ("cpu", "reference", "cuda")
Beta = Annotated[float, Bounds(0, 1, open_high=True)]


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What to train on: "tinyworld", or a folder that `headrace data build` wrote.

    `seed` selects tinyworld's texts, or the order of a folder's documents. `vocab_size` is the model's; 0 takes the
    folder's, see `resolved`. A model may have more tokens than the tokenizer, never fewer.
    `shuffle` "documents" keeps the pieces of a long document together; "pieces" spreads them, which suits books.
    """

    source: PathText = "tinyworld"
    vocab_size: Natural = 512
    seed: Natural = 0
    shuffle: Annotated[str, OneOf(SHUFFLES)] = "documents"

    def __post_init__(self) -> None:
        check(self, "data.")
        require(bool(self.source), "data.source='' must be tinyworld or a folder")
        if self.source == "tinyworld":
            require(self.vocab_size > 0, "data.vocab_size=0 must be an integer of at least 1 for tinyworld")
            return
        require(
            os.path.isdir(self.source),
            f"data.source={self.source!r} is neither tinyworld nor a folder: build one with `headrace data build`",
        )
        tokens = self._folder_vocabulary()
        require(
            self.vocab_size == 0 or self.vocab_size >= tokens,
            f"data.vocab_size={self.vocab_size} is less than "
            f"the {tokens} tokens of {self.source}: set data.vocab_size={tokens}, or 0 to take the folder's",
        )

    def resolved(self) -> DataConfig:
        """A copy in which a `vocab_size` of 0 is replaced by the folder's."""
        return self if self.vocab_size else dataclasses.replace(self, vocab_size=self._folder_vocabulary())

    def _folder_vocabulary(self) -> int:
        try:
            return read_index(self.source).vocab_size
        except ConfigError as error:
            raise ConfigError(f"data.source: {error}") from None


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    The rate rises linearly for `warmup_steps`. Then, by `schedule`: "cosine" falls to `final_lr_ratio` of it at the
    last step; "wsd" (warm up, stay, decay) stays, and falls linearly to that in the last `decay_ratio` of the steps.
    `weight_decay` applies to matrices, not to norms and biases. `grad_clip` bounds the global norm; 0 means no bound.
    """

    learning_rate: PositiveNumber = 1e-3
    warmup_steps: Natural = 0
    schedule: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    decay_ratio: Fraction = 0.2
    final_lr_ratio: Fraction = 0.1
    weight_decay: Amount = 0.1
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveNumber = 1e-8
    grad_clip: Amount = 1.0

    def __post_init__(self) -> None:
        check(self, "optimizer.")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. A step takes `batch_size` rows, each filled with whole texts up to `seq_length` tokens.

    The batch is cut into `micro_batches` parts, at least one for each copy of the model, which computes its parts one
    after another; gradients are added in one tree, so the bits do not depend on which copy computes a part.
    `recompute`: what backward recomputes instead of keeping: "none", "selective" (attention) or "full" (every block).
    K and V are rounded to `kv_cache_dtype` in attention, as in the server that will serve the model.

    Every `validate_every` steps and at the end, the loss of `validation_sequences` held-out sequences is computed;
    every `sample_every` steps the sampler is called, if there is one; every `snapshot_every` steps and at the end a
    snapshot is written, and the newest `keep_snapshots` are kept. 0 means never; 0 validation sequences means all.

    In float16 the loss is multiplied by a scale, which begins at `loss_scale`, doubles after `loss_scale_steps` steps
    in a row with finite gradients, and is halved after a step without, which updates nothing. `peak_flops`: the
    operations per second of which `mfu` is the fraction; 0 measures this machine's matrix product.
    """

    steps: PositiveInteger
    batch_size: PositiveInteger = 8
    seq_length: Annotated[int, Bounds(2)] = 256
    micro_batches: PositiveInteger = 1
    recompute: Annotated[str, OneOf(RECOMPUTE)] = "none"
    validate_every: Natural = 0
    validation_sequences: Natural = 256
    sample_every: Natural = 0
    snapshot_every: Natural = 0
    keep_snapshots: PositiveInteger = 2
    loss_scale: Annotated[float, Bounds(1, 2.0**120)] = 65536.0
    loss_scale_steps: PositiveInteger = 2000
    init_std: PositiveNumber = 0.02
    seed: Natural = 0
    kernels: Annotated[str, OneOf(KERNELS)] = "cpu"
    kv_cache_dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    peak_flops: Amount = 0.0

    def __post_init__(self) -> None:
        check(self, "train.")
        require(
            math.frexp(self.loss_scale)[0] == 0.5,
            f"train.loss_scale={self.loss_scale:g} must be a power of two, so that it rounds nothing",
        )
        require(
            self.micro_batches <= self.batch_size,
            f"train.micro_batches={self.micro_batches} is more than "
            f"the rows of a batch, train.batch_size={self.batch_size}",
        )


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How the model is divided over ranks. `tensor`: the ranks of a tensor-parallel group, a power of two.

    The number of processes, divided by `tensor`, is the number of copies of the model. `sequence` also splits
    the rows of norms and of the residual stream over the tensor ranks (sequence parallelism). `partition_activations`
    divides the activation checkpoints of full recomputation over them.

    `zero` is the stage at which the copies divide optimizer state (1), gradients (2) and parameters (3). They exchange
    about `bucket` elements at a time, while computing where `overlap`. `reduction` "tree" sums gradients in one shape
    at any number of copies; "library" leaves the order to the communication library. `reduce_every` "step" sums a
    copy's micro-steps first. Optimizer state and activation checkpoints may be offloaded: to a mapped file in
    `offload_folder`, with a GPU to host memory.

    After `timeout` seconds without an answer, a rank counts as lost.
    """

    tensor: PositiveInteger = 1
    sequence: bool = False
    zero: Annotated[int, Bounds(0, 3)] = 0
    bucket: PositiveInteger = 1 << 22
    overlap: bool = True
    reduction: Annotated[str, OneOf(REDUCTIONS)] = "tree"
    reduce_every: Annotated[str, OneOf(REDUCE_EVERY)] = "micro_step"
    offload_optimizer: bool = False
    partition_activations: bool = False
    offload_activations: bool = False
    offload_folder: PathText = ""
    timeout: Annotated[float, Bounds(0, WEEK, open_low=True)] = 300.0

    def __post_init__(self) -> None:
        check(self, "parallel.")
        require(self.tensor & (self.tensor - 1) == 0, f"parallel.tensor={self.tensor} must be a power of two")
        require(
            self.reduce_every == "micro_step" or self.zero < 2,
            f"parallel.reduce_every={self.reduce_every!r} "
            f"keeps all gradients of a step on every rank, which parallel.zero={self.zero} avoids: use "
            "parallel.zero=1, or reduce every micro_step",
        )
        require(
            not (self.partition_activations and self.tensor == 1),
            "parallel.partition_activations=true divides "
            "checkpoints over the tensor-parallel ranks: set parallel.tensor to 2 or more, or leave it out",
        )
        require(
            not (self.partition_activations and self.sequence),
            "parallel.partition_activations=true and "
            "parallel.sequence=true divide the same tensors: leave one of them out",
        )
        folder = self.offload_folder
        require(
            not folder or os.path.isdir(folder),
            f"parallel.offload_folder={folder!r} is not a folder",
        )


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe. `init` is the folder whose weights training starts from; "" means random weights."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init: str = ""

    def __post_init__(self) -> None:
        train = self.train
        require(
            train.seq_length <= self.model.max_position_embeddings,
            f"train.seq_length={train.seq_length} is more than "
            f"model.max_position_embeddings={self.model.max_position_embeddings}",
        )
        require(
            self.model.vocab_size == self.data.vocab_size,
            f"model.vocab_size={self.model.vocab_size} differs from data.vocab_size={self.data.vocab_size}",
        )
        divides = [name for name in ("partition_activations", "offload_activations") if getattr(self.parallel, name)]
        require(
            not divides or train.recompute == "full",
            f"parallel.{''.join(divides[:1])}=true needs full recomputation: set train.recompute=full",
        )

    @property
    def notes(self) -> list[str]:
        """What a run does otherwise than its recipe says, a line each."""
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        capped = f"optimizer.warmup_steps={warmup} is more than train.steps={steps}: the rate rises to the last step"
        return [capped] if warmup > steps else []


SECTIONS: Mapping[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "parallel": ParallelConfig,
}
FROM_DATA = ("vocab_size", "bos_token_id", "eos_token_ids")
"""Fields of `ModelConfig` that the data decides."""
NOT_OF_THE_WEIGHTS = ("dtype", "virtual_shards", "dropout")
"""Fields of `ModelConfig` that may differ from those of the folder that training starts from."""


def recipe_keys() -> dict[str, list[str]]:
    """{section: its keys}."""
    keys = {name: [item.name for item in dataclasses.fields(kind)] for name, kind in SECTIONS.items()}
    keys["model"] = ["init", *(key for key in keys["model"] if key not in FROM_DATA)]
    return keys


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a file, or by its name one that comes with headrace.

    An override is `section.key=value`, the value as in TOML; a bare word is a string. With `model.init`, the model is
    the one in that folder. Raises `ConfigError` that names the file, the key and the nearest known one, and
    `CheckpointError` for a folder that cannot be read.
    """
    path = find_recipe(path)
    sections, changed = _sections(path), []
    for override in overrides:
        section, key, value = _parse_override(override)
        _refuse_unknown({section: {key: value}}, "--set")
        sections.setdefault(section, {})[key] = value
        changed.append(f"{section}.{key}=")
    try:
        return _recipe(sections)
    except ConfigError as error:
        source = "--set " if str(error).startswith(tuple(changed)) else f"{path}: "
        raise ConfigError(f"{source}{error}") from None


def _sections(path: Path) -> dict[str, Any]:
    """The tables of a recipe file, which have no unknown keys."""
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    _refuse_unknown(sections, f"{path}:")
    return sections


def _recipe(sections: Mapping[str, Mapping[str, Any]]) -> Recipe:
    given = {name: dict(sections.get(name, {})) for name in SECTIONS}
    init = read_value(PathText, given["model"].pop("init", ""), "model.init")
    if init:
        model = _initial_model(init, given["model"])
        data = _data_of_model(given["data"], model, init)
    else:
        data = read_fields(DataConfig, given["data"], "data.").resolved()
        model = read_fields(ModelConfig, {**given["model"], "vocab_size": data.vocab_size}, "model.")
        read_value(Annotated[str, OneOf(tuple(FAMILIES))], model.architecture, "model.architecture")
    return Recipe(
        model,
        data,
        read_fields(TrainConfig, given["train"], "train."),
        read_fields(OptimizerConfig, given["optimizer"], "optimizer."),
        read_fields(ParallelConfig, given["parallel"], "parallel."),
        init,
    )


def _parse_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    require(bool(equals and dot and section and key), f"--set {printable(text)}: write it as section.key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):  # a bare word
        parsed = {"value": value.strip()}
    require(len(parsed) == 1, f"--set {printable(text)}: give one value")
    return section, key, parsed["value"]


def _refuse_unknown(sections: Mapping[str, Any], source: str) -> None:
    known = recipe_keys()
    for name, section in sections.items():
        require(
            name in known,
            f"{source} [{printable(name)}] is not a section of a recipe; did you mean "
            f"[{nearest(name, known)}]? There are {', '.join(known)}",
        )
        require(isinstance(section, dict), f"{source} {name} must be a section, [{name}]")
        for key in section:
            require(
                key in known[name],
                f"{source} {name}.{printable(key)} does not exist; did you mean {_meant(name, key)}?",
            )


def _meant(section: str, key: str) -> str:
    """The same key in another section, or the nearest one in this."""
    known = recipe_keys()
    elsewhere = [name for name, keys in known.items() if key in keys]
    return f"{elsewhere[0]}.{key}" if elsewhere else f"{section}.{nearest(key, known[section])}"


def _initial_model(init: str, given: Mapping[str, Any]) -> ModelConfig:
    """The model in a folder, with the recipe's values for fields that its weights do not fix."""
    try:
        config = read_config(resolve(init))
    except CheckpointError as error:
        raise CheckpointError(f"model.init: {error}") from None
    known, free = field_types(ModelConfig), {}
    for key, given_value in given.items():
        value = read_value(known[key], given_value, f"model.{key}")
        if key in NOT_OF_THE_WEIGHTS:
            free[key] = value
            continue
        theirs = getattr(config, key)
        require(
            theirs == value,
            f"model.{key}={value!r} differs from {theirs!r} of {init}, which model.init starts from: leave it out",
        )
    return dataclasses.replace(config, **free)


def _data_of_model(given: Mapping[str, Any], model: ModelConfig, init: str) -> DataConfig:
    """The data of a recipe whose vocabulary is a given model's."""
    known = field_types(DataConfig)
    given = {key: read_value(known[key], value, f"data.{key}") for key, value in given.items()}
    asked = given.get("vocab_size") or model.vocab_size
    require(
        asked == model.vocab_size,
        f"data.vocab_size={asked} differs from the {model.vocab_size} tokens of {init}, "
        "which model.init starts from: leave it out",
    )
    if given.get("source", "tinyworld") != "tinyworld":
        tokens = DataConfig(**{**given, "vocab_size": 0}).resolved().vocab_size
        require(
            tokens <= model.vocab_size,
            f"data.source={given['source']!r} has {tokens} tokens, more than the "
            f"{model.vocab_size} of {init}: build it with --tokenizer {init}",
        )
    return DataConfig(**{**given, "vocab_size": model.vocab_size})
