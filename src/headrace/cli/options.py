"""Flags generated from `EngineOptions`, so that flags and keywords stay the same."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from headrace.errors import HeadraceError
from headrace.llm.options import EngineOptions

__all__ = ["add_engine_options", "engine_options"]


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except HeadraceError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    convert.__name__ = parse.__name__
    return convert


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every field: block_size becomes --block-size; booleans also get --no-…"""
    group = parser.add_argument_group("engine")
    for item in fields(EngineOptions):
        flag = "--" + item.name.replace("_", "-")
        default = item.default if not isinstance(item.default, bool) else "yes" if item.default else "no"
        text = f"{item.metadata['help']} (default: {default}: {item.metadata['why']})".replace("%", "%%")
        if isinstance(item.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=item.default, help=text)
            continue
        parse = item.metadata.get("parse", type(item.default))
        group.add_argument(
            flag,
            type=_typed(parse),
            default=item.default,
            choices=item.metadata["choices"] or None,
            help=text,
            metavar=None if item.metadata["choices"] else "N",
        )


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine's keywords from parsed arguments."""
    return {item.name: getattr(arguments, item.name) for item in fields(EngineOptions)}
