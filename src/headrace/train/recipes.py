"""The recipes that come with headrace: files in the package, found by name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from headrace.errors import ConfigError
from headrace.typed import expanded

__all__ = ["find_recipe", "recipe_names"]

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
SUFFIX = ".toml"


def recipe_names() -> list[str]:
    """The names of the recipes that come with headrace."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def find_recipe(path_or_name: str | Path) -> Path:
    """A file as it is; where there is none, headrace's own recipe of that name: demo, demo.toml or recipes/demo.toml.

    Raises `ConfigError` that lists the names.
    """
    path = expanded(path_or_name)
    if os.path.exists(path) and not os.path.isdir(path):  # False, not an error, for a name that is too long
        return path
    known, name = recipe_names(), path.name.removesuffix(SUFFIX)
    if name in known and path.parent in (Path(), Path(FOLDER.name)):
        return FOLDER / f"{name}{SUFFIX}"
    if os.path.isdir(path):
        raise ConfigError(f"{path}: cannot be read: it is a folder, not a recipe's file")
    near = difflib.get_close_matches(name, known, 1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{path}: cannot be read: there is no such file; {guess}headrace brings the recipes {', '.join(known)}"
    )
