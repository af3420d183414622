"""Values from outside (files, recipes, keywords), read by the annotations of frozen dataclasses.

    rate: Annotated[float, Bounds(0.0, 1.0)] = 0.1          kind: Annotated[str, OneOf(("cosine", "wsd"))]

`read_fields` makes a dataclass of a mapping; `check`, in `__post_init__`, checks one that code has made. An
integer is also a float, a list is also a tuple, a mapping is also a nested dataclass; nothing else is converted.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from headrace.errors import CheckpointError, ConfigError

__all__ = [
    "Amount",
    "Bounds",
    "Fraction",
    "Natural",
    "OneOf",
    "PathText",
    "PositiveInteger",
    "PositiveNumber",
    "check",
    "expanded",
    "field_types",
    "nearest",
    "printable",
    "read_fields",
    "read_json",
    "read_value",
]

T = TypeVar("T")
LARGEST = 2**63 - 1
LONGEST_PATH = 4096
SHOWN = 100
"""Characters of a wrong value that an error shows."""
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of a number. An open one excludes the bound itself."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is within the bounds."""
        over = value > self.low if self.open_low else value >= self.low
        return over and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"{'more than' if self.open_low else 'at least'} {self.low:.15g}")
        if self.high < math.inf:
            bounds.append(f"{'less than' if self.open_high else 'at most'} {self.high:.15g}")
        return " and ".join(bounds)


@dataclass(frozen=True, slots=True)
class OneOf:
    """The values that a field may have."""

    values: tuple[Any, ...]


class _Path:
    """Marks text that names a file or folder: ~ is expanded."""


Natural = Annotated[int, Bounds(0)]
PositiveInteger = Annotated[int, Bounds(1)]
Amount = Annotated[float, Bounds(0)]
PositiveNumber = Annotated[float, Bounds(0, open_low=True)]
Fraction = Annotated[float, Bounds(0, 1)]
PathText = Annotated[str, _Path]


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with a leading ~ or ~user replaced by that home folder, if there is one."""
    return Path(os.path.expanduser(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which may begin with a byte-order mark. Raises `CheckpointError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: give a folder in Hugging Face layout") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_fields(kind: type[T], values: object, prefix: str = "", *, loose: bool = False) -> T:
    """The dataclass `kind` with these values. Raises `ConfigError` that names the key after `prefix`, as "train.".

    `loose`, for the files of others: unknown keys are passed over, and a key whose value is None counts as absent.
    """
    hints = field_types(kind)  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.') or kind.__name__}={_shown(values)} must be a table with {', '.join(hints)}"
        )
    given = {key: value for key, value in values.items() if not (loose and value is None)}
    for key in () if loose else given:
        if key not in hints:
            raise ConfigError(
                f"{prefix}{printable(key)} does not exist; did you mean {prefix}{nearest(str(key), hints)}?"
            )
    read = {key: read_value(hints[key], value, prefix + key, loose) for key, value in given.items() if key in hints}
    missing = [
        item.name
        for item in dataclasses.fields(kind)  # type: ignore[arg-type]
        if item.name not in read and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"[{prefix[:-1]}] lacks {', '.join(missing)}" if prefix else f"{missing[0]} is missing")
    try:
        return kind(**read)
    except ConfigError as error:  # of fields that do not go together
        message = str(error)
        raise ConfigError(message if message.startswith(prefix) else prefix + message) from None


def check(instance: Any, prefix: str = "") -> None:
    """Check a frozen dataclass from its `__post_init__`, and keep every value in its annotated type."""
    for key, hint in field_types(type(instance)).items():  # type: ignore[arg-type]
        object.__setattr__(instance, key, read_value(hint, getattr(instance, key), prefix + key))


def read_value(hint: Any, value: Any, name: str, loose: bool = False) -> Any:
    """`value` in the annotated type. Raises `ConfigError` that begins with `name` and says what it must be."""
    marks: list[Any] = []
    base = hint
    if typing.get_origin(hint) is Annotated:
        base, *marks = typing.get_args(hint)
    for mark in marks:
        if isinstance(mark, OneOf):
            if value not in mark.values or type(value) is not type(mark.values[mark.values.index(value)]):
                raise ConfigError(f"{name}={_shown(value)} is not one of {', '.join(map(str, mark.values))}")
            return value
    bounds = next((mark for mark in marks if isinstance(mark, Bounds)), Bounds())
    read = _read(base, value, name, loose)
    if read is _WRONG or (isinstance(read, (int, float)) and not bounds.holds(read)):
        raise ConfigError(f"{name}={_shown(value)} must be {_described(base, bounds)}")
    if _Path in marks:
        if len(read) > LONGEST_PATH or "\0" in read:
            raise ConfigError(f"{name}={_shown(value)} is not a path")
        return os.path.expanduser(read)
    return read


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`."""
    return difflib.get_close_matches(name, list(known), 1, cutoff=0.0)[0]


def printable(name: str) -> str:
    """A key of a file for an error of one line."""
    return name if name.isprintable() else repr(name)


_WRONG = object()


def _read(base: Any, value: Any, name: str, loose: bool) -> Any:
    """`value` in the type `base`, without bounds; `_WRONG` if it has another type."""
    origin, arguments = typing.get_origin(base) or base, typing.get_args(base)
    if base is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _read_union(arguments, value, name, loose)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return _WRONG
        return tuple(read_value(arguments[0], one, f"{name}[{i}]", loose) for i, one in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return _WRONG
        return {key: read_value(arguments[1], one, f"{name}.{printable(key)}", loose) for key, one in value.items()}
    if dataclasses.is_dataclass(base):
        return value if isinstance(value, base) else read_fields(base, value, f"{name}.", loose=loose)  # type: ignore[arg-type]
    if isinstance(value, bool) or base is bool:
        return value if isinstance(value, bool) and base is bool else _WRONG
    if base is int:
        return value if isinstance(value, int) and abs(value) <= LARGEST else _WRONG
    if base is float:
        return _finite(value)
    if base is str:
        return value if isinstance(value, str) and not any("\ud800" <= one <= "\udfff" for one in value) else _WRONG
    return value if isinstance(value, base) else _WRONG


def _read_union(options: tuple[Any, ...], value: Any, name: str, loose: bool) -> Any:
    """By the first option that takes `value`; if there is only one besides None, its own error."""
    if value is None:
        return None if type(None) in options else _WRONG
    options = tuple(option for option in options if option is not type(None))
    for option in options:
        try:
            return read_value(option, value, name, loose)
        except ConfigError:
            if len(options) == 1:
                raise
    return _WRONG


def _finite(value: Any) -> Any:
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return _WRONG
    return number if math.isfinite(number) else _WRONG


def _described(hint: Any, bounds: Bounds | None = None) -> str:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Annotated:
        return _described(arguments[0], next((mark for mark in arguments[1:] if isinstance(mark, Bounds)), None))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_described(option) for option in arguments if option is not type(None))
    if origin is tuple:
        return f"a list, each {_described(arguments[0])}"
    if origin in (dict, Mapping):
        return f"a table, each value {_described(arguments[1])}"
    text = str(KINDS.get(hint) or getattr(hint, "__name__", hint))
    limits = str(bounds or "")
    return f"{text}{' of' if hint is int else ','} {limits}" if limits else text


@cache
def field_types(kind: Any) -> dict[str, Any]:
    """{name: annotation} of a dataclass's fields."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep list
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
