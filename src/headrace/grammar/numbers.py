"""Numbers of a schema as llguidance keeps them: it reads doubles, and some bounds loosely."""

from __future__ import annotations

import bisect
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

from headrace.grammar.written import schemas_of

__all__ = ["MOST", "check_step", "fit_numbers", "plain_value"]

EXACT = 2**53
"""Whole numbers up to here are doubles, each with both neighbours."""
WIDEST = 2**59
"""No bound that llguidance computes with may be further from 0."""
TINY = 1e-9
"""How far within an exclusive bound the inclusive one lies that stands for it where llguidance would not exclude it."""
MOST = 1_000_000
"""Items, properties or characters that are counted; a greater maximum means this one."""
LOW, HIGH = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
Bound = tuple[int | float, bool]
"""A number, and whether it is excluded."""


def check_step(step: int | float) -> None:
    """Raise `ValueError` for a divisor that is not kept exactly."""
    _decimal(step)


def plain_value(value: Any) -> Any:
    """A const as llguidance writes it. Raises `ValueError` where it would write another value, or none."""
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        return {name: plain_value(item) for name, item in value.items()}
    if isinstance(value, str):
        if any((character < " " and character not in "\b\f\n\r\t") or character == "\x7f" for character in value):
            raise ValueError(
                f"{value[:20]!r} has a control character that only \\u could write, which is not used here"
            )
        return value
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return int(value)
    if isinstance(value, int) and abs(value) > EXACT:
        raise ValueError(f"{str(value)[:40]} is beyond 2^53, where numbers are not kept exactly")
    return value


def fit_numbers(definitions: dict[str, Any]) -> None:
    """Tighten bounds in place until llguidance keeps them. Raises `ValueError` where it would keep other ones."""
    schemas = list(schemas_of(definitions.values()))
    bounds = [_bounds(schema) for schema in schemas]
    opposite_lows = sorted(-low[0] for low, _ in bounds if low)
    highs = sorted(high[0] for _, high in bounds if high)
    for schema, (low, high) in zip(schemas, bounds):
        if low:
            value, excluded = _raised(*low)
            # Within one unit, llguidance forgets that a whole lower bound is excluded.
            if excluded and value == int(value) and _has_within(highs, value):
                value, excluded = value + TINY, False
            _replace(schema, LOW, value, excluded)
        if high:
            value, excluded = _raised(-high[0], high[1])
            if excluded and value == int(value) and _has_within(opposite_lows, value):
                value, excluded = value + TINY, False
            _replace(schema, HIGH, -value, excluded)
        for key in ("maxItems", "maxLength", "maxProperties"):
            if schema.get(key, 0) > MOST:
                schema[key] = MOST
    _refuse_large_steps({schema["multipleOf"] for schema in schemas if "multipleOf" in schema})


def _has_within(values: list[int | float], start: int | float) -> bool:
    """Whether one of the sorted values lies between `start` and the next whole number."""
    after = bisect.bisect_right(values, start)
    return after < len(values) and values[after] < start + 1


def _bounds(schema: dict[str, Any]) -> tuple[Bound | None, Bound | None]:
    """The stronger of both lower bounds, and of both upper ones."""
    low = max(((schema[key], key == LOW[1]) for key in LOW if key in schema), default=None)
    high = min(((schema[key], key != HIGH[1]) for key in HIGH if key in schema), default=None)
    return low, None if high is None else (high[0], not high[1])


def _raised(value: int | float, excluded: bool) -> Bound:
    """The least lower bound that is no looser and that a double holds."""
    if value < -WIDEST:
        return -WIDEST, False
    if value > WIDEST:
        raise ValueError(f"has a bound of {value}, beyond what is kept: use one nearer to 0 than 2^59")
    found = float(value)
    if Fraction(found) < Fraction(value) or (excluded and abs(found) >= EXACT):
        found, excluded = math.nextafter(found, math.inf), False
    return (int(found) if found.is_integer() else found), excluded


def _replace(schema: dict[str, Any], keys: tuple[str, str], value: int | float, excluded: bool) -> None:
    for key in keys:
        schema.pop(key, None)
    schema[keys[excluded]] = value


def _decimal(step: int | float) -> tuple[int, int]:
    """A divisor as digits and the number of them behind the point, computed as llguidance does."""
    value, places = float(step), 0
    while value != math.floor(value) and places < 20:
        value, places = value * 10, places + 1
    if value >= 2**32 or Fraction(value) / 10**places != Fraction(Decimal(repr(step))):
        raise ValueError(f"cannot be honoured: {step} has too many digits to be kept exactly")
    return int(value), places


def _refuse_large_steps(steps: set[int | float]) -> None:
    """Where two divisors meet, llguidance computes a common multiple in 32 bits, and does not see it overflow."""
    if len(steps) < 2:
        return
    decimals = [_decimal(step) for step in steps]
    most = max(places for _, places in decimals)
    if math.prod(digits * 10 ** (most - places) for digits, places in decimals) >= 2**32:
        listed = ", ".join(map(str, sorted(steps)))
        raise ValueError(f"has divisors whose product is too large to be kept exactly: multipleOf of {listed}")
