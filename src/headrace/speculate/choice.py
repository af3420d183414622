"""The number of drafts of a step that brings the most tokens per second, when chances and costs are known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, repeat
from operator import add, truediv
from typing import NamedTuple

__all__ = ["LIMITS", "Slots", "WeighedSlots", "best_choice", "reach"]

LIMITS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Longest drafts of a draft model that are weighed, besides none."""


def reach(near: int | None) -> int:
    """The longest draft of a draft model that is weighed: the limit next above `near`."""
    return LIMITS[-1] if near is None else next((limit for limit in LIMITS if limit > near), LIMITS[-1])


class Slots:
    """Every token that could be drafted: its chance to be kept, its offer and, with a draft model, its place there."""

    def __init__(self) -> None:
        self.chances: list[float] = []
        self.owners: list[int] = []
        self.depths: list[int] = []
        """-1 of what no model drafts."""
        self.behind: list[int] = []
        """By offer: the rows of the draft model's pass that gives its first token."""
        self.deepest = 0
        """Passes that all slots together need."""

    def add(self, chances: Sequence[float], behind: int) -> None:
        """The tokens of one more offer; `behind` is 0 of what no model drafts."""
        count = len(chances)
        self.chances.extend(chances)
        self.owners.extend(repeat(len(self.behind), count))
        self.behind.append(behind)
        if behind:
            self.depths.extend(range(count))
            self.deepest = max(self.deepest, count)
        else:
            self.depths.extend(repeat(-1, count))

    def counts(self, chosen: Sequence[int]) -> list[int]:
        """The number of chosen slots of each offer."""
        found = [0] * len(self.behind)
        for owner in map(self.owners.__getitem__, chosen):
            found[owner] += 1
        return found


class WeighedSlots(NamedTuple):
    """Slots in the order in which they deserve to be drafted; what the step gives and costs with none, one, two, …"""

    order: list[int]
    values: list[float]
    steps: list[float]
    """Seconds without those of a draft model."""
    costs: list[float]
    cut: int
    """The best number of slots."""
    limit: int = 0
    """The longest draft of a draft model among them."""

    def rate(self) -> float:
        """Tokens per second that it promises."""
        return self.values[self.cut] / self.costs[self.cut]


def best_choice(
    slots: Slots, rows: int, steps: list[float], passes: Sequence[float], near: int | None, margin: float
) -> WeighedSlots:
    """The best number of slots. `steps`: seconds of the step with none, one, two, … as many as fit.

    `passes`: seconds of a pass of the draft model of 0, 1, … rows. A pass for one request costs about what it costs
    for all, so a few long drafts can spoil a good choice: drafts up to each of `LIMITS` are weighed, or only up to
    those next to the limit `near`. A choice of any must promise `margin` more than none.
    """
    fits = len(steps) - 1
    order = sorted(range(len(slots.chances)), key=slots.chances.__getitem__, reverse=True)
    if not slots.deepest:
        return _weigh(order[:fits], slots, rows, steps, None, margin)
    extra = _pass_costs(order, slots, passes)
    choices = []
    for limit in _limits(slots.deepest, near):
        kept = [at for at, slot in enumerate(order) if slots.depths[slot] < limit][:fits]
        spent = list(accumulate(map(extra.__getitem__, kept), initial=0.0))
        found = _weigh([order[at] for at in kept], slots, rows, steps, spent, margin)
        choices.append(found._replace(limit=limit))
    return max(choices, key=WeighedSlots.rate)


def _limits(deepest: int, near: int | None) -> list[int]:
    """The limits to weigh, and 0 for what no model drafts."""
    known = [0, *(limit for limit in LIMITS if limit <= deepest)]
    if known[-1] < deepest:
        known.append(deepest)
    if near is None or near not in known:
        return known
    at = known.index(near)
    return known[max(at - 1, 0) : at + 2]


def _pass_costs(order: Sequence[int], slots: Slots, passes: Sequence[float]) -> list[float]:
    """The seconds that each slot adds to the draft model's passes, when those before it are drafted."""
    served = [0] * (slots.deepest + 1)
    depths, owners, behind = slots.depths, slots.owners, slots.behind
    found = []
    for slot in order:
        depth = depths[slot]
        if depth < 0:
            found.append(0.0)
            continue
        before = served[depth]
        after = served[depth] = before + (1 if depth else behind[owners[slot]])
        found.append(passes[after] - passes[before])
    return found


def _weigh(
    order: list[int], slots: Slots, rows: int, steps: list[float], spent: list[float] | None, margin: float
) -> WeighedSlots:
    """How many of these slots, from the first, bring the most tokens per second."""
    values = list(accumulate(map(slots.chances.__getitem__, order), initial=float(rows)))
    costs = steps[: len(values)] if spent is None else list(map(add, steps, spent))
    rates = list(map(truediv, values, costs))
    rate = max(rates)
    cut = rates.index(rate)
    if rate < rates[0] * (1 + margin):
        cut = 0
    return WeighedSlots(order, values, steps[: len(values)], costs, cut)
