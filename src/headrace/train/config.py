"""Recipes: TOML files with the model, the data and the settings of a training run. Unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.config import DTYPES, ModelConfig, one_of, require
from headrace.errors import ConfigError
from headrace.model.folder import read_config, resolve
from headrace.train.corpus.index import read_index
from headrace.train.recipes import find_recipe

__all__ = ["DataConfig", "OptimizerConfig", "ParallelConfig", "Recipe", "TrainConfig", "load_recipe", "recipe_keys"]

SCHEDULES = ("cosine", "wsd")
RECOMPUTE = ("none", "selective", "full")
REDUCTIONS = ("tree", "library")
REDUCE_EVERY = ("micro_step", "step")
SHUFFLES = ("documents", "pieces")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What to train on: "tinyworld", or a folder that `headrace data build` wrote.

    `seed` selects tinyworld's texts, or the order of a folder's documents. `vocab_size` is the model's; 0 takes the
    folder's, see `resolved`. A model may have more tokens than the tokenizer, never fewer.
    `shuffle` "documents" keeps the pieces of a long document together; "pieces" spreads them, which suits books.
    """

    source: str = "tinyworld"
    vocab_size: int = 512
    seed: int = 0
    shuffle: str = "documents"

    def __post_init__(self) -> None:
        require(isinstance(self.source, str) and bool(self.source), f"data.source={self.source!r} must be a string")
        _integer("data.vocab_size", self.vocab_size, 0)
        _integer("data.seed", self.seed, 0)
        one_of("data.shuffle", self.shuffle, SHUFFLES)
        if self.source == "tinyworld":
            require(self.vocab_size > 0, "data.vocab_size=0 must be an integer of at least 1 for tinyworld")
            return
        require(
            Path(self.source).is_dir(),
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

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "cosine"
    decay_ratio: float = 0.2
    final_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        _integer("optimizer.warmup_steps", self.warmup_steps, 0)
        one_of("optimizer.schedule", self.schedule, SCHEDULES)
        for name in ("learning_rate", "eps"):
            _number(f"optimizer.{name}", getattr(self, name), 0.0, math.inf, open_low=True)
        for name in ("weight_decay", "grad_clip"):
            _number(f"optimizer.{name}", getattr(self, name), 0.0, math.inf)
        for name in ("final_lr_ratio", "beta1", "beta2", "decay_ratio"):
            _number(f"optimizer.{name}", getattr(self, name), 0.0, 1.0)
        require(self.beta1 < 1.0 and self.beta2 < 1.0, "optimizer.beta1 and optimizer.beta2 must be less than 1")


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

    steps: int
    batch_size: int = 8
    seq_length: int = 256
    micro_batches: int = 1
    recompute: str = "none"
    validate_every: int = 0
    validation_sequences: int = 256
    sample_every: int = 0
    snapshot_every: int = 0
    keep_snapshots: int = 2
    loss_scale: float = 65536.0
    loss_scale_steps: int = 2000
    init_std: float = 0.02
    seed: int = 0
    kernels: str = "cpu"
    kv_cache_dtype: str = "float32"
    peak_flops: float = 0.0

    def __post_init__(self) -> None:
        for name, low in (
            ("steps", 1),
            ("batch_size", 1),
            ("seq_length", 2),
            ("micro_batches", 1),
            ("validate_every", 0),
            ("validation_sequences", 0),
            ("sample_every", 0),
            ("snapshot_every", 0),
            ("keep_snapshots", 1),
            ("loss_scale_steps", 1),
            ("seed", 0),
        ):
            _integer(f"train.{name}", getattr(self, name), low)
        one_of("train.recompute", self.recompute, RECOMPUTE)
        _number("train.init_std", self.init_std, 0.0, math.inf, open_low=True)
        _number("train.peak_flops", self.peak_flops, 0.0, math.inf)
        _number("train.loss_scale", self.loss_scale, 1.0, 2.0**120)
        require(
            math.frexp(self.loss_scale)[0] == 0.5,
            f"train.loss_scale={self.loss_scale:g} must be a power of two, so that it rounds nothing",
        )
        require(
            self.micro_batches <= self.batch_size,
            f"train.micro_batches={self.micro_batches} is more than "
            f"the rows of a batch, train.batch_size={self.batch_size}",
        )
        one_of("train.kv_cache_dtype", self.kv_cache_dtype, DTYPES)


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

    tensor: int = 1
    sequence: bool = False
    zero: int = 0
    bucket: int = 1 << 22
    overlap: bool = True
    reduction: str = "tree"
    reduce_every: str = "micro_step"
    offload_optimizer: bool = False
    partition_activations: bool = False
    offload_activations: bool = False
    offload_folder: str = ""
    timeout: float = 300.0

    def __post_init__(self) -> None:
        _integer("parallel.tensor", self.tensor, 1)
        require(self.tensor & (self.tensor - 1) == 0, f"parallel.tensor={self.tensor} must be a power of two")
        for name in ("sequence", "overlap", "offload_optimizer", "partition_activations", "offload_activations"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"parallel.{name}={value!r} must be true or false")
        one_of("parallel.reduction", self.reduction, REDUCTIONS)
        one_of("parallel.reduce_every", self.reduce_every, REDUCE_EVERY)
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
            isinstance(folder, str) and (not folder or Path(folder).is_dir()),
            f"parallel.offload_folder={folder!r} is not a folder",
        )
        _integer("parallel.zero", self.zero, 0)
        require(self.zero <= 3, f"parallel.zero={self.zero} must be a stage of ZeRO: 0, 1, 2 or 3")
        _integer("parallel.bucket", self.bucket, 1)
        _number("parallel.timeout", self.timeout, 0.0, math.inf, open_low=True)


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
        train, warmup = self.train, self.optimizer.warmup_steps
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
        require(warmup <= train.steps, f"optimizer.warmup_steps={warmup} is more than train.steps={train.steps}")


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
    try:
        sections: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        section, key, value = _parse_override(override)
        sections.setdefault(section, {})[key] = value
    _refuse_unknown(sections, str(path))
    given = {name: dict(sections.get(name, {})) for name in SECTIONS}
    init = given["model"].pop("init", "")
    require(isinstance(init, str), f"model.init={init!r} must be a folder or a Hugging Face id")
    if init:
        model = _initial_model(init, given["model"])
        data = _data_of_model(given["data"], model, init)
    else:
        data = _build("data", given["data"]).resolved()
        model = _build("model", given["model"], {"vocab_size": data.vocab_size})
    return Recipe(
        model,
        data,
        _build("train", given["train"]),
        _build("optimizer", given["optimizer"]),
        _build("parallel", given["parallel"]),
        init,
    )


def _parse_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    require(bool(equals and dot and section and key), f"--set {text}: write it as section.key=value")
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, value.strip()


def _refuse_unknown(sections: Mapping[str, Any], path: str) -> None:
    known = recipe_keys()
    for name, section in sections.items():
        require(
            name in known,
            f"{path}: [{name}] is not a section of a recipe; did you mean "
            f"[{_nearest(name, known)}]? There are {', '.join(known)}",
        )
        require(isinstance(section, dict), f"{path}: {name} must be a section, [{name}]")
        for key in section:
            require(key in known[name], f"{path}: {name}.{key} does not exist; did you mean {_meant(name, key)}?")


def _meant(section: str, key: str) -> str:
    """The same key in another section, or the nearest one in this."""
    known = recipe_keys()
    elsewhere = [name for name, keys in known.items() if key in keys]
    return f"{elsewhere[0]}.{key}" if elsewhere else f"{section}.{_nearest(key, known[section])}"


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), 1, cutoff=0.0)[0]


def _initial_model(init: str, given: Mapping[str, Any]) -> ModelConfig:
    """The model in a folder, with the recipe's values for fields that its weights do not fix."""
    config = read_config(resolve(init))
    free = {}
    for key, value in _plain(given).items():
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
    asked = given.get("vocab_size") or model.vocab_size
    require(
        asked == model.vocab_size,
        f"data.vocab_size={asked} differs from the {model.vocab_size} tokens of {init}, "
        "which model.init starts from: leave it out",
    )
    if given.get("source", "tinyworld") != "tinyworld":
        tokens = _build("data", {**given, "vocab_size": 0}).resolved().vocab_size
        require(
            tokens <= model.vocab_size,
            f"data.source={given['source']!r} has {tokens} tokens, more than the "
            f"{model.vocab_size} of {init}: build it with --tokenizer {init}",
        )
    data: DataConfig = _build("data", {**given, "vocab_size": model.vocab_size})
    return data


def _build(section: str, values: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Any:
    kind = SECTIONS[section]
    missing = [
        item.name
        for item in dataclasses.fields(kind)
        if item.name not in {**values, **(given or {})}
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"[{section}] lacks {', '.join(missing)}")
    try:
        return kind(**_plain(values), **(given or {}))
    except TypeError as error:
        raise ConfigError(f"[{section}] has a value of the wrong type: {error}") from None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _integer(name: str, value: object, low: int) -> None:
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= low,
        f"{name}={value!r} must be an integer of at least {low}",
    )


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and low <= float(value) <= high and not (open_low and value == low)  # type: ignore[arg-type]
    bound = f"{'more than' if open_low else 'at least'} {low:g}"
    bound += "" if math.isinf(high) else f" and at most {high:g}"
    require(ok, f"{name}={value!r} must be a number, {bound}")
