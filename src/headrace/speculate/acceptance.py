"""`Acceptance`: how likely each token of a draft is right, given that those before it are."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.speculate.base import DRAFT, Offer

__all__ = ["Acceptance"]

_POSITIONS = 8
"""Places in a draft with an estimate of their own; later ones have that of the last."""
_KEEP = 1 - 1 / 96
"""What remains of earlier evidence when an offer is learned from: about the latest hundred count."""
_KEEP_RARE = _KEEP**8
_PRIOR, _DRAFT_PRIOR = 0.1, 0.7
_PRIOR_WEIGHT = 4.0
"""Before any evidence drafts count as seen four times and nearly never right: they must earn their rows. Those of a
draft model count as mostly right: nothing is known of it until it drafts, and a dozen wrong ones tell.

As evidence comes this is forgotten. Later places, and offers by their match, keep a prior of this weight: the rate of
the place before, and that of all offers.
"""
_BUCKETS = 8
_REQUEST_WINDOW = 24.0
"""Drafts of one request that its own estimate remembers,"""
_REQUEST_WEIGHT = 4.0
"""shrunk as if it had as many more that are like those of all."""
_CHANCE = 1.5
"""Standard deviations that chance explains; what is twice as far counts in full."""
_SURE = 0.99
_FLOOR = 0.02
"""A draft less likely than this to be kept is no use."""
_USUAL = 16
"""Chances of drafts up to this long are computed once for all requests that are like the rest."""


class _Tally:
    """Decayed counts of one kind of offer: tokens that were tried at each place, and those that were right.

    A new count weighs more instead of the old ones less, so that learning touches only the places it is about.
    """

    __slots__ = ("chances", "rates", "right", "stale", "tried", "weight")

    def __init__(self, prior: float | None = None) -> None:
        """`prior`: the first rate of a proposer's offers together."""
        self.right = [0.0] * _POSITIONS
        self.tried = [0.0] * _POSITIONS
        if prior is not None:
            self.right[0], self.tried[0] = prior * _PRIOR_WEIGHT, _PRIOR_WEIGHT
        self.weight = 1.0
        self.rates = [_PRIOR] * _POSITIONS
        self.chances: list[float] = []
        """Those of a draft of `_USUAL` tokens."""
        self.stale = True

    def learn(self, right: int, wrong: bool, keep: float) -> None:
        weight = self.weight = self.weight / keep
        for position in range(min(right, _POSITIONS)):
            self.right[position] += weight
            self.tried[position] += weight
        if wrong:
            self.tried[min(right, _POSITIONS - 1)] += weight
        if weight > 1e9:
            self.right = [count / weight for count in self.right]
            self.tried = [count / weight for count in self.tried]
            self.weight = 1.0
        self.stale = True

    def refresh(self, pooled: list[float] | None) -> None:
        """The rate of each place, shrunk toward that of all offers, or without it toward the place before."""
        right, tried, weight = self.right, self.tried, _PRIOR_WEIGHT * self.weight
        rates = []
        rate = right[0] / tried[0] if pooled is None else pooled[0]
        for position in range(_POSITIONS):
            prior = rate if pooled is None else pooled[position]
            rate = (right[position] + weight * prior) / (tried[position] + weight)
            rates.append(rate)
        self.rates, self.stale = rates, False
        self.chances = _chances(rates, 0.0, 0.0, _USUAL)


def _chances(rates: list[float], first: float, later: float, most: int) -> list[float]:
    """Products of the first 1, 2, … `most` rates, as far as they reach the floor; `first` and `later` are added."""
    found = []
    chance = 1.0
    rate = 0.0
    shift = first
    for position in range(most):
        if position < _POSITIONS:
            rate = rates[position] + shift
            if rate > _SURE:
                rate = _SURE
            shift = later
        chance *= rate
        if chance < _FLOOR:
            break
        found.append(chance)
    return found


class _Kind:
    """The tallies of one proposer: of all its offers, and by the length of their match."""

    __slots__ = ("buckets", "pooled")

    def __init__(self, proposer: str) -> None:
        self.pooled = _Tally(_DRAFT_PRIOR if proposer == DRAFT else _PRIOR)
        self.buckets: list[_Tally | None] = [None] * _BUCKETS

    def bucket(self, match: int) -> _Tally:
        index = match if match < 4 else min(1 + match.bit_length(), _BUCKETS - 1)
        found = self.buckets[index]
        if found is None:
            found = self.buckets[index] = _Tally()
        return found

    def fresh(self, match: int) -> _Tally:
        """The tally for a match of this length, with rates that count all that was learned."""
        if self.pooled.stale:
            self.pooled.refresh(None)
            for other in self.buckets:
                if other is not None:
                    other.stale = True
        tally = self.bucket(match)
        if tally.stale:
            tally.refresh(self.pooled.rates)
        return tally


@dataclass(slots=True)
class _Surplus:
    """How many of a request's drafts were right lately beyond what was expected."""

    tried: float = 0.0
    surplus: float = 0.0
    variance: float = 0.0
    """Of the surplus, if the request is like all."""
    shift: float = 0.0
    """What to add to the rates of all; 0 as long as chance explains the surplus.

    So requests that are alike get drafts of the same length, and a draft model few passes.
    """

    def learn(self, right: int, tried: int, expected: float) -> None:
        keep = _REQUEST_WINDOW / (_REQUEST_WINDOW + tried)
        self.tried = self.tried * keep + tried
        self.surplus = self.surplus * keep + right - expected
        self.variance = self.variance * keep * keep + expected * (1 - expected / tried)
        deviations = abs(self.surplus) / (self.variance**0.5 + 1e-9)
        trust = min(max(deviations / _CHANCE - 1, 0.0), 1.0)
        self.shift = trust * self.surplus / (self.tried + _REQUEST_WEIGHT)


class _Record:
    """A request's surplus at the first place of drafts, and at later ones.

    They are apart because the rates of all at later places are already those of requests whose drafts begin right.
    """

    __slots__ = ("first", "later")

    def __init__(self) -> None:
        self.first = _Surplus()
        self.later = _Surplus()

    def learn(self, right: int, tried: int, rates: list[float]) -> None:
        self.first.learn(min(right, 1), 1, rates[0])
        if tried > 1:
            expected = sum(rates[1:tried]) + max(tried - _POSITIONS, 0) * rates[-1]
            self.later.learn(right - 1, tried - 1, expected)


class Acceptance:
    """Estimates by proposer, length of the match and place in the draft, corrected for each request.

    A request differs from the rest by two numbers, added to the rates of all: its surpluses over what was expected,
    at the first place and at later ones. Memory: a record for each living request and proposer.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self._records: dict[int, dict[str, _Record]] = {}

    def marginals(self, offer: Offer) -> list[float]:
        """For each token of the offer, how likely it and all before it are right; ends where that hardly is.

        Strictly decreasing, so the best tokens of several offers never leave out one before another.
        """
        request_id, proposer, match, most, _ = offer
        kind = self._kinds.get(proposer)
        if kind is None:
            kind = self._kinds[proposer] = _Kind(proposer)
        tally = kind.fresh(match)
        records = self._records.get(request_id)
        if records is None:
            records = self._records[request_id] = {}
        record = records.get(proposer)
        if record is None:
            record = records[proposer] = _Record()
        first, later = record.first.shift, record.later.shift
        if first or later or most > _USUAL:
            return _chances(tally.rates, first, later, most)
        return tally.chances[:most]

    def learn(self, offer: Offer, right: int, wrong: bool, rare: bool = False) -> None:
        """See `Gamma.learn`. The records of a request that is gone, or was never asked about, do not change.

        `rare` evidence is one of the few drafts that were made in a long time, so what is older counts less.
        """
        tried = right + wrong
        if tried <= 0:
            return
        kind = self._kinds.get(offer.proposer)
        if kind is None:
            kind = self._kinds[offer.proposer] = _Kind(offer.proposer)
        tally = kind.bucket(offer.match)
        record = self._records.get(offer.request_id, {}).get(offer.proposer)
        if record is not None:
            # The rates of the last choice: those of now would count other offers of the same step.
            record.learn(right, tried, tally.rates)
        keep = _KEEP_RARE if rare else _KEEP
        kind.pooled.learn(right, wrong, keep)
        tally.learn(right, wrong, keep)

    def finish(self, request_id: int) -> None:
        """Forget a request."""
        self._records.pop(request_id, None)

    def explain(self) -> dict[str, object]:
        """The rates of each proposer by place, and the number of requests with a record, for people."""
        rates = {name: [round(rate, 3) for rate in kind.pooled.rates] for name, kind in self._kinds.items()}
        return {"rates": rates, "requests": len(self._records)}

    def check_integrity(self) -> None:
        """Raise AssertionError unless every estimate is a probability."""
        for name, kind in self._kinds.items():
            for tally in [kind.pooled, *(bucket for bucket in kind.buckets if bucket is not None)]:
                assert all(0 <= r <= t for r, t in zip(tally.right, tally.tried)), f"{name}: more right than tried"
                assert all(0 < rate < 1 for rate in tally.rates), f"{name}: {tally.rates} are no rates"
        for records in self._records.values():
            for record in records.values():
                for part in (record.first, record.later):
                    assert abs(part.surplus) <= part.tried + 1e-6, f"{part} differs by more than it tried"
