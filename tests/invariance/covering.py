"""Covering arrays: few cells in which every two, or every three, values of different axes meet."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["covered", "covering", "spread"]

Row = dict[str, Any]


def covered(row: Mapping[str, Any], axes: Sequence[str], strength: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    """The combinations of `strength` (axis, value) pairs that a row has."""
    return itertools.combinations([(axis, row[axis]) for axis in axes if axis in row], strength)


def covering(values: Mapping[str, Sequence[Any]], strength: int) -> list[Row]:
    """Rows in which all combinations of `strength` values of different axes stand, always the same rows.

    Lei and Tai's IPO: rows for the first `strength` axes in full; then one more axis at a time, whose values are put
    where they complete the most combinations, and rows for what is still missing. A row may leave an axis open until
    a later combination needs it; what is open at the end is filled at random.
    """
    order = sorted(values, key=lambda axis: (-len(values[axis]), axis))
    begun = order[:strength]
    rows: list[Row] = [dict(zip(begun, row)) for row in itertools.product(*(values[axis] for axis in begun))]
    for done in range(strength, len(order)):
        axis, earlier = order[done], order[:done]
        missing = {
            (*other, (axis, value)): None
            for axes in itertools.combinations(earlier, strength - 1)
            for other in itertools.product(*([(a, v) for v in values[a]] for a in axes))
            for value in values[axis]
        }
        for row in rows:
            others = list(covered(row, earlier, strength - 1))
            counts = [sum((*other, (axis, value)) in missing for other in others) for value in values[axis]]
            if max(counts) > 0:
                row[axis] = values[axis][counts.index(max(counts))]
                for other in others:
                    missing.pop((*other, (axis, row[axis])), None)
        for wanted in missing:
            fitting = (row for row in rows if all(row.get(a, v) == v for a, v in wanted))
            found = next(fitting, None)
            if found is None:
                rows.append(found := {})
            found.update(wanted)
    draw = random.Random(0)
    return [{axis: row.get(axis, draw.choice(values[axis])) for axis in values} for row in rows]


def spread(rows: Sequence[Row]) -> list[Row]:
    """The same rows in an order in which any few neighbours have every value, and the first few most pairs of values.

    Rounds: each row is the one with most values that its round has not had, then with most pairs that none has had,
    then with the values of which most rows are left, so that the last rows still have every value.
    """
    left, order = list(rows), []
    everything = {pair for row in rows for pair in row.items()}
    new_values, new_pairs = set(everything), {pair for row in rows for pair in covered(row, list(row), 2)}
    while left:
        rest = Counter(pair for row in left for pair in row.items())
        gains = [
            (
                len(new_values & row.items()),
                len(new_pairs.intersection(covered(row, list(row), 2))),
                sum(rest[pair] for pair in row.items()),
            )
            for row in left
        ]
        row = left.pop(gains.index(max(gains)))
        order.append(row)
        new_values = new_values - row.items() or set(everything)
        new_pairs.difference_update(covered(row, list(row), 2))
    return order
