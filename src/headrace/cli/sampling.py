"""Flags for `SamplingParams`."""

from __future__ import annotations

import argparse
from typing import Any

from headrace.engine.schedule.sampling import SamplingParams

__all__ = ["add_sampling_options", "given_sampling", "sampling_params"]

FLAGS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "tokens to generate"),
    "min_tokens": (int, "tokens before an end token or a stop string may end it"),
    "n": (int, "choices for each prompt"),
    "temperature": (float, "0 is greedy"),
    "top_k": (int, "sample among the k best; 0 is all"),
    "top_p": (float, "sample among the best that make up this probability"),
    "min_p": (float, "drop tokens below this fraction of the best one's probability"),
    "repetition_penalty": (float, "divide the logits of tokens seen before"),
    "presence_penalty": (float, "subtract from the logits of tokens in the output"),
    "frequency_penalty": (float, "the same, times their count"),
    "seed": (int, "the same seed gives the same tokens, whatever else runs; -1 is a random one"),
    "beam_width": (int, "beam search with this many beams"),
    "length_penalty": (float, "beams rank by log-probability / length to this power"),
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every parameter; defaults come from the model's generation_config.json."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in FLAGS.items():
        group.add_argument("--" + name.replace("_", "-"), dest=name, type=kind, default=None, help=text, metavar="N")
    group.add_argument(
        "--stop", action="append", default=None, metavar="TEXT", help="end before this text; may be given again"
    )
    group.add_argument("--ignore-eos", action="store_true", default=None, help="do not end at the model's end token")


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, by name."""
    given = {name: getattr(arguments, name) for name in (*FLAGS, "stop", "ignore_eos")}
    return {name: value for name, value in given.items() if value is not None}


def sampling_params(arguments: argparse.Namespace, defaults: dict[str, Any], **overrides: Any) -> SamplingParams:
    """The model's defaults, then `overrides`, then the flags that were given."""
    return SamplingParams(**{**defaults, **overrides, **given_sampling(arguments)})
