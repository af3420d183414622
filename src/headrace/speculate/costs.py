"""`StepCosts`: what a step costs by its rows, learned from the steps that ran."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass
from itertools import accumulate, repeat

__all__ = ["StepCosts"]

_EXACT = 64
"""Up to here every number of rows has an entry of its own; above, 32 entries share each doubling."""
_NOISE = 0.005
"""Variances are relative: this is of one step's time, about 7% of it."""
_UNSEEN = 0.04
"""Of an entry that is only seeded or extrapolated, and the most that any can have."""
_BETWEEN = 0.01
"""What interpolation between rows and twice as many adds to the variance of its neighbours."""
_FADING = 1e-5
"""What an entry's variance gains with every step that does not see it."""
_KNOWN = 0.002
"""Entries with less variance than this tell whether the load has changed."""
_LOAD_WINDOW = 9
"""Steps whose median error"""
_LOAD_CHANGE = 0.12
"""must be this far from 0 before the load changes: noise of 10% gets there once in millions of steps."""
_LOAD_BLAME = 0.5
"""Of a change of the load, the share that may have been a change of the entries seen since: variance of the others."""
_SLOPE = 0.25
"""Beyond the table, a row costs at least this share of the mean row: less would promise drafts for nothing."""


@dataclass(slots=True)
class _Entry:
    """Seconds at load 1, their relative variance, and the step that saw them last, with its load."""

    seconds: float
    variance: float
    at: int
    load: float


class StepCosts:
    """Seconds by rows. A product's tiles make them stairs, so this is a table, not a line.

    The time of a step is an entry times the load, which all entries share. Each new time corrects its entry, by a
    Kalman filter: a first time counts almost whole, the tenth of many steps alike for a tenth or less. So noise of
    10% moves an entry that is well known by less than 1%, and a wrong one is mended by the first steps that see it.
    A time that is far off, such as that of a paused process, counts only up to three standard deviations.

    The load changes where well-known entries err for several steps in one direction: a busy machine then changes all
    entries at once, also those that nobody uses now. It does not follow small errors. Of several entries the policy
    prefers those that noise has made too cheap, so the errors that it sees are biased, and a load that followed them
    would grow without end.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._rows: list[int] = []
        """The entries' rows, ascending."""
        self._load = 1.0
        self._errors: deque[float] = deque(maxlen=_LOAD_WINDOW)
        """Of well-known entries, since the load changed."""
        self._steps = 0

    def __bool__(self) -> bool:
        return bool(self._rows)

    def seed(self, rows: int, seconds: float) -> None:
        """Give a first value, to be corrected by steps. Does nothing where steps were seen already."""
        key = self._key(rows)
        if seconds > 0 and key not in self._entries:
            self._add(key, seconds / self._load)

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took this long."""
        if seconds <= 0 or rows <= 0:  # a clock that is too coarse says nothing
            return
        key = self._key(rows)
        self._steps += 1
        if key not in self._entries:
            self._add(key, (self.curve(key, 0)[0] if self._rows else seconds) / self._load)
        entry = self._entries[key]
        variance = self._variance(entry)
        total = variance + _NOISE
        bound = 3 * total**0.5
        far = seconds / (entry.seconds * self._load) - 1
        error = min(max(far, -bound), bound)
        entry.seconds *= 1 + variance / total * error
        if variance < _KNOWN:
            self._follow(far)
        if error == far:  # else it is as uncertain as before
            variance *= 1 - variance / total
        entry.variance, entry.at, entry.load = variance, self._steps, self._load

    def curve(self, rows: int, count: int) -> list[float]:
        """Seconds of `rows`, `rows` + 1, … `rows` + `count`, never decreasing. The table must not be empty."""
        last = rows + count
        keys, values = self._fit(rows, last)
        found: list[float] = []
        at, left, base = rows, keys[0], values[0]
        if at < left:
            slope = _SLOPE * base / left
            found = [base - slope * (left - row) for row in range(at, min(left, last + 1))]
            at += len(found)
        for right, value in zip(keys[1:], values[1:]):
            if at < right and at <= last:
                slope = (value - base) / (right - left)
                steps = min(right, last + 1) - at
                found += accumulate(repeat(slope, steps - 1), initial=base + slope * (at - left))
                at += steps
            left, base = right, value
        if at <= last:
            slope = self._slope_beyond(left, base)
            found += accumulate(repeat(slope, last - at), initial=base + slope * (at - left))
        return found

    def seconds(self, rows: int) -> float:
        """Of a step of this many rows. The table must not be empty."""
        return self.curve(rows, 0)[0]

    def doubts(self, rows: int, count: int) -> list[float]:
        """The relative standard deviations of what `curve` gives."""
        last = rows + count
        low = max(bisect_right(self._rows, rows) - 1, 0)
        found: list[float] = []
        at, before, left = rows, _UNSEEN, 1
        for key in self._rows[low : bisect_left(self._rows, last) + 1]:
            here = self._variance(self._entries[key])
            if key > at:
                between = min(max(before, here) + _BETWEEN * (key - left) / left, _UNSEEN) ** 0.5
                found += [between] * (min(key, last + 1) - at)
                at = rows + len(found)
            if key == at and at <= last:
                found.append(here**0.5)
                at += 1
            before, left = here, key
        return found + [_UNSEEN**0.5] * (count + 1 - len(found))

    def explain(self) -> dict[str, object]:
        """The load, and the seconds of each entry at that load, for people."""
        entries = {rows: self._entries[rows].seconds * self._load for rows in self._rows}
        return {"load": self._load, "steps": self._steps, "seconds": entries}

    def check_integrity(self) -> None:
        """Raise AssertionError unless the index and the entries agree and all values make sense."""
        assert self._rows == sorted(self._entries), "the index of rows is not that of the entries"
        assert self._load > 0, "the load is no load"
        for rows, entry in self._entries.items():
            assert entry.seconds > 0 and 0 <= entry.variance <= _UNSEEN, f"the entry of {rows} rows: {entry}"

    @staticmethod
    def _key(rows: int) -> int:
        """The rows of the entry for `rows`: never fewer."""
        if rows <= _EXACT:
            return rows
        unit = 1 << ((rows - 1).bit_length() - 6)
        return -(-rows // unit) * unit

    def _add(self, key: int, seconds: float) -> None:
        self._entries[key] = _Entry(seconds, _UNSEEN, self._steps, self._load)
        insort(self._rows, key)

    def _follow(self, error: float) -> None:
        """Change the load, if most of the latest steps of well-known entries took as much longer, or shorter."""
        self._errors.append(error)
        if len(self._errors) == _LOAD_WINDOW:
            median = sorted(self._errors)[_LOAD_WINDOW // 2]
            if abs(median) > _LOAD_CHANGE:
                self._load *= 1 + median
                self._errors.clear()

    def _variance(self, entry: _Entry) -> float:
        moved = self._load / entry.load - 1
        return min(entry.variance + _FADING * (self._steps - entry.at) + _LOAD_BLAME * moved * moved, _UNSEEN)

    def _fit(self, first: int, last: int) -> tuple[list[int], list[float]]:
        """The entries around [first, last], with seconds that never decrease.

        Entries that do are noise: they get one value, their mean weighted by certainty (isotonic regression).
        """
        low = bisect_right(self._rows, first) - 1
        high = bisect_left(self._rows, last) + 1
        keys = self._rows[max(low, 0) : high]
        entries = [self._entries[key] for key in keys]
        load = self._load
        values: list[float] = []
        pools: list[tuple[float, float, int]] = []  # mean, weight, entries
        highest = 0.0
        for entry in entries:
            value, weight, size = entry.seconds, 1 / (entry.variance + 1e-6), 1
            if value < highest:
                while pools and pools[-1][0] > value:
                    mean, more, others = pools.pop()
                    value = (value * weight + mean * more) / (weight + more)
                    weight, size = weight + more, size + others
            highest = value
            pools.append((value, weight, size))
        if len(pools) == len(keys):
            return keys, [entry.seconds * load for entry in entries]
        for mean, _, size in pools:
            values += [mean * load] * size
        return keys, values

    def _slope_beyond(self, last: int, seconds: float) -> float:
        """Of a row beyond the table: the slope since half the rows, as two neighbours differ by noise."""
        least = _SLOPE * seconds / last
        index = bisect_right(self._rows, last // 2) - 1
        if index < 0:
            return least
        rows = self._rows[index]
        return max((seconds - self._entries[rows].seconds * self._load) / (last - rows), least)
