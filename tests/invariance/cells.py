"""The axes that stand in `axes/`, and `Cell`, one value of each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import Field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from invariance.axis import Axis

__all__ = ["AXES", "Cell", "names", "question", "values"]

AXES: Mapping[str, Axis] = {
    name: importlib.import_module(f"invariance.axes.{name}").AXIS
    for _, name, _ in pkgutil.iter_modules([str(Path(__file__).with_name("axes"))])
}


def names(cell: Any) -> str:
    """The values that are not the plainest, as "chunk=7 load=16"."""
    return " ".join(f"{f.name}={getattr(cell, f.name)}" for f in fields(cell) if getattr(cell, f.name) != f.default)


# A type checker cannot see the fields that `make_dataclass` makes.
if TYPE_CHECKING:

    class Cell:
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, axis: str) -> Any: ...

else:
    Cell = make_dataclass(
        "Cell",
        [(name, Any, axis.values[0]) for name, axis in AXES.items()],
        frozen=True,
        kw_only=True,
        namespace={"__str__": lambda cell: names(cell) or "plainest"},
    )
"""One arrangement, a field for each axis. The defaults are the plainest values."""


def question(cell: Any) -> Any:
    """The plainest cell that asks for the same tokens: the baseline that `cell` is compared with."""
    return Cell(**{name: getattr(cell, name) for name, axis in AXES.items() if axis.question})


def values(costly: bool = True) -> dict[str, tuple[Any, ...]]:
    """The values of every axis, with or without the costly ones."""
    return {
        name: tuple(value for value in axis.values if costly or value not in axis.costly) for name, axis in AXES.items()
    }
