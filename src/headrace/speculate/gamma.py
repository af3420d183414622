"""`FixedGamma` and `AutoGamma`: how many drafts each request gets in a step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import truediv

from headrace.speculate.acceptance import Acceptance
from headrace.speculate.base import DRAFT, Offer
from headrace.speculate.choice import Slots, WeighedSlots, best_choice, reach
from headrace.speculate.costs import StepCosts
from headrace.speculate.timing import StepTimer

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
_SHORTEST_WAIT, _LONGEST_WAIT = 2, 16
"""Steps from one probe of a draft model to the next, where it is right and where it always is wrong.

Every second step at least goes without: what probes cost is known only beside it.
"""
_LONGEST_REST = 64
"""Steps without drafts until requests wait again for a choice."""
_PASS_GUESS = 0.5
"""What a pass of a draft model costs before one was timed, in steps of as many rows."""
_CATCH_UP = 16
"""Steps over which the rows that a draft model must catch up with are charged: it has them from then on."""
_MOST_SLOTS = 256
"""Tokens of drafts that are weighed in a step: of many requests the first tokens alone."""


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

    def passed(self, rows: int, seconds: float) -> None:
        """See `Gamma`."""

    def began(self, rows: int) -> None:
        """See `Gamma`."""

    def ended(self, rows: int) -> None:
        """See `Gamma`."""

    def finish(self, request_id: int) -> None:
        """See `Gamma`."""


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
        self._timer = StepTimer(clock)
        self._passes = StepCosts()
        self._limit = 0
        """The longest draft of a draft model in the latest choice."""
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

    def seed_pass(self, rows: int, seconds: float) -> None:
        """A first value of what a pass of the draft model costs."""
        self._passes.seed(rows, seconds)

    def choose(self, offers: Sequence[Offer], rows: int, spare: int) -> list[int]:
        """See `Gamma`."""
        self._timer.planned()
        if self._steps < self._asked + min(self._rest, _PATIENCE) and all(offer.behind for offer in offers):
            return [0] * len(offers)  # nothing was learned of a model that drafted nothing
        self._asked, self._rest = self._steps, min(2 * self._rest or 1, _LONGEST_REST)
        if not offers or spare <= 0 or rows <= 0 or not self.costs:
            return [0] * len(offers)
        slots = Slots()
        marginals, most = self.acceptance.marginals, max(_MOST_SLOTS // len(offers), 1)
        near = self._limit if self._drafting and self._steps % _PATIENCE else None
        longest = min(most, reach(near))
        for offer in offers:
            slots.add(marginals(offer)[: longest if offer.behind else most], _charged(offer.behind))
        best = self._best(slots, rows, spare, near)
        self._drafting = best.cut > 0
        if best.cut:
            self._rest = 0
        cut = best.cut
        if best.order and self._steps - self._tried >= _PATIENCE:
            self._tried = self._steps
            cut = self._trial(best, rows)
        counts = slots.counts(best.order[:cut])
        if best.cut or self._rest > _PATIENCE // 2:  # else the model drafted a few steps ago
            self._probe(offers, counts, rows, spare, best.rate())
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
        """See `Gamma`. Where drafts do not pay, it is asked again after 1, 2, 4, … `_LONGEST_REST` steps without."""
        return self._steps >= self._asked + self._rest

    def passed(self, rows: int, seconds: float) -> None:
        """See `Gamma`."""
        self._passes.observe(rows, seconds)
        self._timer.passed(seconds)

    def began(self, rows: int) -> None:
        """See `Gamma`."""
        self._timer.began(rows)

    def ended(self, rows: int) -> None:
        """See `Gamma`."""
        seconds = self._timer.ended(rows, self.costs.seconds(rows) if self.costs else 0.0)
        if seconds is None:
            return
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

    def _best(self, slots: Slots, rows: int, spare: int, near: int | None) -> WeighedSlots:
        """The best number of slots. Much longer and shorter drafts of a draft model are weighed now and then."""
        steps = self.costs.curve(rows, min(len(slots.chances), spare))
        passes = self._pass_costs(max(sum(slots.behind), len(slots.behind)), rows) if slots.deepest else []
        found = best_choice(slots, rows, steps, passes, near, 0.0 if self._drafting else _MARGIN)
        self._limit = found.limit
        return found

    def _trial(self, choice: WeighedSlots, rows: int) -> int:
        """Another number of drafts, if it would be better at a cost that is lower by twice its deviation.

        Then one step tells, where waiting never would: a cost that nobody pays is not measured.
        """
        _, values, steps, costs, cut, _ = choice
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
        """Seconds of a draft model's pass of 0, 1, … `most` rows."""
        if self._passes:
            return [0.0, *self._passes.curve(1, most - 1)]
        return [0.0] + [_PASS_GUESS * self.costs.seconds(rows)] * most

    def _probe(self, offers: Sequence[Offer], counts: list[int], rows: int, spare: int, rate: float) -> None:
        """Ask a draft model that is not used for single tokens: what it would have drafted is never known otherwise.

        The wait doubles with each probe, and ends with one that is right: then more requests are asked, as many as
        cost less than twice what one does. Those come first for which the model has the least to catch up. What a
        probe loses is its time without that of the tokens it is thought to bring, at `rate` tokens per second: so a
        model that is nearly worth its time is soon known well.
        """
        if self._credit is None or self._steps < self._probed + self._wait:
            return
        used = sum(counts)
        idle = [i for i, offer in enumerate(offers) if offer.behind and not counts[i] and offer.most > 0]
        number = min(len(idle), spare - used)
        if number <= 0:
            return
        idle = idle[self._turn % len(idle) :] + idle[: self._turn % len(idle)]
        idle.sort(key=lambda i: offers[i].behind)
        behind = list(accumulate(offers[i].behind for i in idle[:number]))
        steps, passes = self.costs.curve(rows + used, number), self._pass_costs(behind[-1], rows)
        brought = accumulate((self.acceptance.marginals(offers[i]) or [0.0])[0] / rate for i in idle[:number])
        losses = [max(steps[k + 1] - steps[0] + passes[behind[k]] - gain, 0.0) for k, gain in enumerate(brought)]
        most = 2 * losses[0] if self._wait <= _SHORTEST_WAIT else losses[0]
        number = bisect_right(losses, min(most, self._credit))
        if not number:
            return
        self._credit -= losses[number - 1]
        self._probed = self._steps
        self._wait = min(self._wait * 2, _LONGEST_WAIT)
        for i in idle[:number]:
            counts[i] = 1
            self._probes.add(offers[i].request_id)
        self._turn += number


def _charged(behind: int) -> int:
    """Rows of a draft model's first pass as one step is charged for them."""
    return behind if behind <= 2 else 2 + -(-(behind - 2) // _CATCH_UP)
