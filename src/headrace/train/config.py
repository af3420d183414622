"""Recipes: a TOML file with what to train, on what, and how. Unknown fields are refused by name."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.config import DTYPES, ModelConfig, one_of, require
from headrace.errors import ConfigError
from headrace.train.corpus.index import read_index

__all__ = ["DataConfig", "Recipe", "TrainConfig", "load_recipe"]

SHUFFLES = ("documents", "pieces")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What to train on: "tinyworld", or a folder that `headrace data build` wrote.

    `seed` says which texts of tinyworld, or in which order a folder's documents come. `vocab_size` is the model's;
    0 takes the folder's, see `resolved`. A model may have more tokens than the tokenizer, never fewer.
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
        require(Path(self.source).is_dir(), f"data.source={self.source!r} is not one of tinyworld and the folders "
                "that `headrace data build` wrote")
        tokens = self._folder_vocabulary()
        require(self.vocab_size == 0 or self.vocab_size >= tokens, f"data.vocab_size={self.vocab_size} differs from "
                f"the {tokens} tokens of {self.source}: set data.vocab_size={tokens}, or 0 to take the folder's")

    def resolved(self) -> DataConfig:
        """The same with a `vocab_size` of 0 replaced by the folder's."""
        return self if self.vocab_size else dataclasses.replace(self, vocab_size=self._folder_vocabulary())

    def _folder_vocabulary(self) -> int:
        try:
            return read_index(self.source).vocab_size
        except ConfigError as error:
            raise ConfigError(f"data.source: {error}") from None


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. A step takes `batch_size` rows, each filled with whole texts up to `seq_length` tokens.

    The learning rate rises linearly for `warmup_steps`, then falls as a cosine to `final_lr_ratio` of itself at
    the last step. `weight_decay` applies to matrices. `grad_clip` bounds the global norm; 0 does not.
    `sample_every` steps, the trainer calls the sampler, if it was given one; 0 never. K and V are rounded to
    `kv_cache_dtype` in attention, as the server that will serve the model does.
    """

    steps: int
    batch_size: int = 8
    seq_length: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    final_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    init_std: float = 0.02
    seed: int = 0
    sample_every: int = 0
    kernels: str = "cpu"
    kv_cache_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("seq_length", 2), ("warmup_steps", 0),
                          ("seed", 0), ("sample_every", 0)):
            _integer(f"train.{name}", getattr(self, name), low)
        for name in ("learning_rate", "eps", "init_std"):
            _number(f"train.{name}", getattr(self, name), 0.0, math.inf, open_low=True)
        for name in ("weight_decay", "grad_clip"):
            _number(f"train.{name}", getattr(self, name), 0.0, math.inf)
        for name in ("final_lr_ratio", "beta1", "beta2"):
            _number(f"train.{name}", getattr(self, name), 0.0, 1.0)
        require(self.beta1 < 1.0 and self.beta2 < 1.0, "train.beta1 and train.beta2 must be less than 1")
        require(self.warmup_steps <= self.steps,
                f"train.warmup_steps={self.warmup_steps} is more than train.steps={self.steps}")
        one_of("train.kv_cache_dtype", self.kv_cache_dtype, DTYPES)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe. `model.vocab_size` is the data's."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        require(self.train.seq_length <= self.model.max_position_embeddings,
                f"train.seq_length={self.train.seq_length} is more than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}")
        require(self.model.vocab_size == self.data.vocab_size, f"model.vocab_size={self.model.vocab_size} "
                f"differs from data.vocab_size={self.data.vocab_size}")


FROM_DATA = ("vocab_size", "bos_token_id", "eos_token_ids")
"""Fields of `ModelConfig` that the data decides."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe. An override is `section.key=value`, the value as in TOML; a bare word is a string.

    Raises `ConfigError` that names the file, the key and the keys there are.
    """
    try:
        sections: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        section, key, value = _parse_override(override)
        sections.setdefault(section, {})[key] = value
    known = ("model", "data", "train")
    for name, section in sections.items():
        require(name in known, f"{path}: {name!r} is not a section of a recipe; there are {', '.join(known)}")
        require(isinstance(section, dict), f"{path}: {name} must be a section, [{name}]")
    data = _build(DataConfig, "data", sections.get("data", {}))
    model = _build(ModelConfig, "model", sections.get("model", {}), {"vocab_size": data.vocab_size})
    return Recipe(model, data, _build(TrainConfig, "train", sections.get("train", {})))


def _parse_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    require(bool(equals and dot and section and key), f"--set {text}: write it as section.key=value")
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, value.strip()


def _build(kind: type[Any], section: str, values: Mapping[str, Any],
           given: Mapping[str, Any] | None = None) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    known = sorted(name for name in fields if kind is not ModelConfig or name not in FROM_DATA)
    for name in values:
        require(name in known, f"{section}.{name} does not exist; [{section}] has {', '.join(known)}")
    missing = [name for name, field in fields.items() if name not in values and name not in (given or {})
               and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]
    require(not missing, f"[{section}] lacks {', '.join(missing)}")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return kind(**plain, **(given or {}))
    except TypeError as error:
        raise ConfigError(f"[{section}] has a value of the wrong type: {error}") from None


def _integer(name: str, value: object, low: int) -> None:
    require(isinstance(value, int) and not isinstance(value, bool) and value >= low,
            f"{name}={value!r} must be an integer of at least {low}")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and low <= float(value) <= high and not (open_low and value == low)  # type: ignore[arg-type]
    bound = f"{'more than' if open_low else 'at least'} {low:g}"
    bound += "" if math.isinf(high) else f" and at most {high:g}"
    require(ok, f"{name}={value!r} must be a number, {bound}")
