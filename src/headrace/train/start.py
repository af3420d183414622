"""The model from which training starts: random weights, or those of a folder."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from headrace.config import ModelConfig
from headrace.errors import ConfigError
from headrace.kernels.autograd import AutogradOps
from headrace.model.folder import resolve
from headrace.model.huggingface import load_weights
from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup
from headrace.text.tokenizer import Tokenizer
from headrace.train.config import Recipe

__all__ = ["first_weights", "initial_model", "initial_tokenizer"]


def initial_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer of the folder `model.init`, if the recipe has one."""
    return Tokenizer.from_folder(resolve(recipe.init)) if recipe.init else None


def initial_model(recipe: Recipe, tokenizer: Tokenizer, ops: AutogradOps, group: RankGroup) -> Transformer:
    """The recipe's model, without memory for its weights where `ops` defer it.

    The tokenizer's end token is added to the tokens that end a generation. Raises `ConfigError` where the data's
    tokenizer is not that of the folder `model.init`.
    """
    tokenizer.check_vocabulary(recipe.model.vocab_size)
    if recipe.init:
        _check_tokenizer(tokenizer, Tokenizer.from_folder(resolve(recipe.init)), recipe)
    return Transformer(_with_end(recipe.model, tokenizer), ops, group=group)


def first_weights(model: Transformer, recipe: Recipe) -> None:
    """Fill the model with random weights, or those of a folder."""
    if recipe.init:
        load_weights(model, resolve(recipe.init))
    else:
        model.init_weights(recipe.train.seed, recipe.train.init_std)


def _with_end(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    eos = tokenizer.eos_token_id
    if eos is None or eos in config.eos_token_ids:
        return config
    return dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, eos))


def _check_tokenizer(data: Tokenizer, model: Tokenizer, recipe: Recipe) -> None:
    advice = f"build the data with --tokenizer {recipe.init}"
    if data.vocab_size != model.vocab_size:
        raise ConfigError(
            f"data.source={recipe.data.source!r} was made with a tokenizer of {data.vocab_size} tokens, "
            f"model.init={recipe.init!r} has one of {model.vocab_size}: {advice}"
        )
    if _meaning(data) != _meaning(model):
        raise ConfigError(
            f"data.source={recipe.data.source!r} was made with another tokenizer than that of "
            f"model.init={recipe.init!r}, though both have {data.vocab_size} tokens: {advice}"
        )


def _meaning(tokenizer: Tokenizer) -> Any:
    """A tokenizer's vocabulary and added tokens, in a form that can be compared."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        file = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    return file["model"], sorted((token["id"], token["content"]) for token in file["added_tokens"])
