"""`FixedGamma` and `AutoGamma`: how many drafts each request gets in a step."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate, repeat
from operator import add, truediv
from typing import NamedTuple

from headrace.speculate.acceptance import Acceptance
from headrace.speculate.base import DRAFT, Offer
from headrace.speculate.costs import StepCosts

__all__ = ["AutoGamma", "FixedGamma"]

_MARGIN = 0.02
"""Drafts must promise this much more than none before they begin: estimates are that uncertain."""
_SHARE = 0.01
"""Of the time of steps, what trials may lose."""
_FIRST_CREDIT = 2.0
_MOST_CREDIT = 4.0
"""Steps that trials may lose at the start, and at once later."""
_PATIENCE = 8
"""Steps from one thought of a trial to the next."""
_SHORTEST_WAIT, _LONGEST_WAIT = 2, 64
"""Steps from one probe of a draft model to the next, where it is right and where it always is wrong.

Every second step at least goes without: what probes cost is known only beside it.
"""
_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Requests for which passes get a first cost."""
_LIMITS = (1, 2, 3, 4, 6, 8, 12)
"""Longest drafts of a draft model that are tried, besides none."""
_PASS_GUESS = 0.5
"""What a pass of a draft model costs before one was timed, in steps of as many rows."""


class FixedGamma:
    """γ is the same for each offer, as far as the offers and the room reach; learns nothing."""

    def __init__(self, number: int) -> None:
        self.number = number

    def choose(self, offers: Sequence[Offer], rows: int, spare: int) -> list[int]:
        """See `Gamma`. Where room is short, every request gets its first draft before any gets its second."""
        wanted = [min(self.number, offer.most) for offer in offers]
        if sum(wanted) <= spare:
            return wanted
        counts = [0] * len(offers)
        for depth in range(self.number):
            for i, most in enumerate(wanted):
                if depth < most and spare > 0:
                    counts[i] += 1
                    spare -= 1
        return counts

    def learn(self, offer: Offer, right: int, wrong: bool) -> None:
        """See `Gamma`."""

    def waits(self) -> bool:
        """See `Gamma`."""
        return self.number > 0

    def drafted(self, requests: int, tokens: int, seconds: float) -> None:
        """See `Gamma`."""

    def began(self, rows: int) -> None:
        """See `Gamma`."""

    def ended(self, rows: int) -> None:
        """See `Gamma`."""

    def finish(self, request_id: int) -> None:
        """See `Gamma`."""


class _Slots(NamedTuple):
    """Every token that could be drafted: its chance to be kept, its offer, and with a draft model its place there."""

    chances: list[float]
    owners: list[int]
    depths: list[int]


class _Choice(NamedTuple):
    """Slots in the order in which they deserve to be drafted; what the step gives and costs with none, one, two, …"""

    order: list[int]
    values: list[float]
    steps: list[float]
    """Seconds without those of a draft model."""
    costs: list[float]
    cut: int
    """The best number of slots."""

    def rate(self) -> float:
        """Tokens per second that it promises."""
        return self.values[self.cut] / self.costs[self.cut]


def _drafting_costs(order: list[int], slots: _Slots, models: list[bool], passes: list[float]) -> list[float]:
    """Seconds of the draft model for the first 0, 1, … slots of `order`: pass k serves requests with more than k."""
    served = [0] * (max(slots.depths, default=0) + 1)
    total = 0.0
    found = [0.0]
    for slot in order:
        if models[slots.owners[slot]]:
            depth = slots.depths[slot]
            number = served[depth]
            served[depth] = number + 1
            total += passes[number + 1] - passes[number]
        found.append(total)
    return found


class AutoGamma:
    """Drafts as many tokens as bring the most tokens per second, none included, by what it has measured.

    The offers' tokens compete in the order of their chance to be kept. Because costs are stairs, the step's tokens
    per second are computed for every number of them, and the best number is drafted. Every row that the step has
    anyway counts as one token, those of prompts too: a draft may delay them only if it brings more than the mean row.

    Estimates must not lock it in: where a cost is uncertain enough that another number could be better, that number
    is tried; and a draft model that is not used is asked for single tokens now and then. What both may lose is
    limited to a hundredth of the time of steps.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.costs = StepCosts()
        self.acceptance = Acceptance()
        self._clock = clock
        self._passes = StepCosts()
        self._depth = 0
        """Passes of the draft model that the latest choice needs."""
        self._begun: deque[tuple[int, float]] = deque()
        self._ended = float("-inf")
        self._steps = 0
        self._credit: float | None = None
        """Seconds that trials may lose; None before the first step."""
        self._tried = 0
        self._probes: set[int] = set()
        """Requests whose probe has no result yet."""
        self._wait = _SHORTEST_WAIT
        self._probed = 0
        self._turn = 0
        self._drafting = False
        self._asked = self._rest = 0
        """The step of the latest choice; those from it on for which no request waits."""

    def seed(self, rows: int, seconds: float) -> None:
        """A first value of a step's cost, as a profile at the start measured it."""
        self.costs.seed(rows, seconds)

    def choose(self, offers: Sequence[Offer], rows: int, spare: int) -> list[int]:
        """See `Gamma`."""
        counts = [0] * len(offers)
        self._depth = 0
        self._asked, self._rest = self._steps, min(2 * self._rest or 1, _LONGEST_WAIT)
        if not offers or spare <= 0 or rows <= 0 or not self.costs:
            return counts
        models = [offer.proposer == DRAFT for offer in offers]
        drafter = True in models
        slots = _Slots([], [], [])
        marginals = self.acceptance.marginals
        for i, offer in enumerate(offers):
            found = marginals(offer)
            slots.chances.extend(found)
            slots.owners.extend(repeat(i, len(found)))
            if drafter:
                slots.depths.extend(range(len(found)))
        best = self._best(slots, models if drafter else [], rows, spare)
        self._drafting = best.cut > 0
        if best.cut:
            self._rest = 0
        cut = best.cut
        if best.order and self._steps - self._tried >= _PATIENCE:
            self._tried = self._steps
            cut = self._trial(best, rows)
        for owner in map(slots.owners.__getitem__, best.order[:cut]):
            counts[owner] += 1
        if drafter:
            self._probe(offers, models, counts, rows, spare)
            self._depth = max(count for count, model in zip(counts, models) if model)
        return counts

    def learn(self, offer: Offer, right: int, wrong: bool) -> None:
        """See `Gamma`."""
        probe = offer.request_id in self._probes and offer.proposer == DRAFT
        self.acceptance.learn(offer, right, wrong, rare=probe)
        if probe:
            self._probes.discard(offer.request_id)
            if right:
                self._wait = _SHORTEST_WAIT

    def waits(self) -> bool:
        """See `Gamma`. Where drafts do not pay, it is asked again after 1, 2, 4, … `_LONGEST_WAIT` steps without."""
        return self._steps >= self._asked + self._rest

    def drafted(self, requests: int, tokens: int, seconds: float) -> None:
        """The draft model took `seconds` for the `tokens` of the latest choice, of so many requests."""
        if tokens <= 0:
            return
        passes = self._depth or -(-tokens // max(requests, 1))
        mean = max(round(tokens / passes), 1)
        if not self._passes and self.costs:  # until they are timed, those of other sizes differ as steps do
            unit = max(seconds / passes, 1e-9) / self.costs.seconds(mean)
            for size in _SIZES:
                self._passes.seed(size, self.costs.seconds(size) * unit)
        self._passes.observe(mean, max(seconds / passes, 1e-9))

    def began(self, rows: int) -> None:
        """See `Gamma`."""
        self._begun.append((rows, self._clock()))

    def ended(self, rows: int) -> None:
        """See `Gamma`. Of two steps in flight, the second one's time starts when the first has ended."""
        now, before = self._clock(), self._ended
        self._ended = now
        while self._begun and self._begun[0][0] != rows:  # steps that were given up
            self._begun.popleft()
        if not self._begun:
            return
        seconds = now - max(self._begun.popleft()[1], before)
        self.costs.observe(rows, seconds)
        self._steps += 1
        if self.costs:
            usual = self.costs.seconds(rows)
            credit = _FIRST_CREDIT * usual if self._credit is None else self._credit
            self._credit = min(credit + _SHARE * min(seconds, 4 * usual), _MOST_CREDIT * usual)

    def finish(self, request_id: int) -> None:
        """See `Gamma`."""
        self.acceptance.finish(request_id)
        self._probes.discard(request_id)

    def explain(self) -> dict[str, object]:
        """What is known: rates of acceptance, costs of steps and of passes, and what trials may lose."""
        return {
            "acceptance": self.acceptance.explain(),
            "costs": self.costs.explain(),
            "passes": self._passes.explain(),
            "credit": self._credit or 0.0,
            "wait": self._wait,
            "drafting": self._drafting,
        }

    def check_integrity(self) -> None:
        """Raise AssertionError unless all estimates make sense."""
        self.costs.check_integrity()
        self._passes.check_integrity()
        self.acceptance.check_integrity()
        assert _SHORTEST_WAIT <= self._wait <= _LONGEST_WAIT, f"a wait of {self._wait} steps"
        assert (self._credit or 0.0) >= 0, "trials have lost more than they may"

    def _best(self, slots: _Slots, models: list[bool], rows: int, spare: int) -> _Choice:
        """The best number of slots. `models` says whose drafts are a draft model's, if there are any."""
        order = sorted(range(len(slots.chances)), key=slots.chances.__getitem__, reverse=True)
        steps = self.costs.curve(rows, min(len(order), spare))
        if not models:
            return self._weigh(order[:spare], slots, rows, steps)
        # A pass for one request costs about what it costs for all, so a few long drafts can spoil a good choice.
        orders = [order]
        longest = max((depth for owner, depth in zip(slots.owners, slots.depths) if models[owner]), default=0)
        for limit in _LIMITS:
            if limit <= longest:
                orders.append([i for i in order if slots.depths[i] < limit or not models[slots.owners[i]]])
        if not all(models):
            orders.append([i for i in order if not models[slots.owners[i]]])
        passes = self._pass_costs(sum(models), rows)
        choices = []
        for order in orders:
            order = order[:spare]
            spent = _drafting_costs(order, slots, models, passes)
            choices.append(self._weigh(order, slots, rows, steps, spent))
        return max(choices, key=_Choice.rate)

    def _weigh(
        self, order: list[int], slots: _Slots, rows: int, steps: list[float], spent: list[float] | None = None
    ) -> _Choice:
        """How many of these slots, from the first, bring the most tokens per second.

        `steps` and `spent`: seconds of the step, and of the draft model, with none, one, two, … of them.
        """
        values = list(accumulate(map(slots.chances.__getitem__, order), initial=float(rows)))
        costs = steps if spent is None else list(map(add, steps, spent))
        rates = list(map(truediv, values, costs))
        rate = max(rates)
        cut = rates.index(rate)
        if cut and not self._drafting and rate < rates[0] * (1 + _MARGIN):
            cut = 0
        return _Choice(order, values, steps[: len(values)], costs, cut)

    def _trial(self, choice: _Choice, rows: int) -> int:
        """Another number of drafts, if it would be better at a cost that is lower by twice its deviation.

        Then one step tells, where waiting never would: a cost that nobody pays is not measured.
        """
        _, values, steps, costs, cut = choice
        least = steps[0]
        doubts = self.costs.doubts(rows, len(steps) - 1)
        low = [cost - step + max(step * (1 - 2 * doubt), least) for cost, step, doubt in zip(costs, steps, doubts)]
        low[0] = costs[0] * (1 - 2 * doubts[0])
        hopes = list(map(truediv, values, low))
        hopes[cut] = 0.0
        hope = max(hopes)
        rate = choice.rate()
        if hope <= rate * (1 + _MARGIN):
            return cut
        rival = hopes.index(hope)
        lost = max(costs[rival] - values[rival] / rate, 0.0)
        if self._credit is None or lost > self._credit:
            return cut
        self._credit -= lost
        return rival

    def _pass_costs(self, most: int, rows: int) -> list[float]:
        """Seconds of a draft model's pass for 0, 1, … `most` requests."""
        if self._passes:
            return [0.0, *self._passes.curve(1, most - 1)]
        return [0.0] + [_PASS_GUESS * self.costs.seconds(rows)] * most

    def _probe(self, offers: Sequence[Offer], models: list[bool], counts: list[int], rows: int, spare: int) -> None:
        """Ask a draft model that is not used for single tokens: what it would have drafted is never known otherwise.

        The wait doubles with each probe, and ends with one that is right: then more requests are asked, as many as
        cost less than twice what one does.
        """
        used = sum(counts)
        idle = [i for i, model in enumerate(models) if model and not counts[i] and offers[i].most > 0]
        number = min(len(idle), spare - used)
        if number <= 0 or self._credit is None or self._steps < self._probed + self._wait:
            return
        steps = self.costs.curve(rows + used, number)
        passes = self._pass_costs(number, rows)
        losses = [steps[k] - steps[0] + passes[k] for k in range(1, number + 1)]
        most = 2 * losses[0] if self._wait <= _SHORTEST_WAIT else losses[0]
        number = bisect_right(losses, min(most, self._credit))
        if not number:
            return
        self._credit -= losses[number - 1]
        self._probed = self._steps
        self._wait = min(self._wait * 2, _LONGEST_WAIT)
        for k in range(number):
            i = idle[(self._turn + k) % len(idle)]
            counts[i] = 1
            self._probes.add(offers[i].request_id)
        self._turn += number
