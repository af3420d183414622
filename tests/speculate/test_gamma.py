"""γ's policy against every fixed γ, in simulated worlds with a virtual clock."""

import random
from collections.abc import Callable

import pytest

from headrace.speculate.base import Offer
from headrace.speculate.gamma import AutoGamma, FixedGamma

UNIT = 0.01
"""Seconds of a step of one row."""
MOST = 8
PROFILE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
ALPHAS = (0.0, 0.2, 0.5, 0.8, 0.95)
STEPS = {1: 600, 8: 250, 16: 200, 64: 100}


def through(points):
    """The line through these points, and beyond them."""
    known = sorted(points.items())

    def cost(rows):
        for (a, low), (b, high) in zip(known, known[1:]):
            if rows <= b or b == known[-1][0]:
                return low + (high - low) * (rows - a) / (b - a)
        raise AssertionError

    return cost


CURVES: dict[str, Callable[[int], float]] = {
    "flat, then steep": lambda rows: 1.0 + 0.25 * max(rows - 4, 0),
    "tiles of eight": lambda rows: 1.0 + 0.3 * ((rows - 1) // 8),
    "linear": lambda rows: 0.5 + 0.5 * rows,
    "measured": through({1: 1.0, 2: 1.02, 4: 1.15, 8: 1.35, 16: 1.9, 32: 3.2, 64: 6.0}),
}


class World:
    """Requests whose drafts are right with a given chance, and steps of a given cost, which the policy sees with noise.

    What it counts has no noise: the tokens that are expected of each choice, and the seconds that it costs.
    """

    def __init__(self, curve, alpha, batch=1, passes=None, *, seed=1, noise=0.1, profile=True, gamma=None):
        """`alpha(request, step)`; `passes`: a draft model's pass costs this many steps. Without it drafts are free."""
        self.random = random.Random(seed)
        self.curve, self.batch, self.passes, self.noise = curve, batch, passes, noise
        self.alpha = alpha if callable(alpha) else lambda request, step: alpha
        self.now = self.tokens = self.seconds = 0.0
        self.steps = 0
        self.load = 1.0
        self.drafted: list[int] = []
        self.gamma = gamma or AutoGamma(lambda: self.now)
        if profile and gamma is None:
            for rows in PROFILE:
                self.gamma.seed(rows, self._noisy(UNIT * curve(rows)))
                if passes is not None:
                    self.gamma.seed_pass(rows, self._noisy(UNIT * passes * curve(rows)))

    def _noisy(self, seconds):
        return seconds * (1 + self.random.uniform(-self.noise, self.noise))

    def _spend(self, seconds):
        self.seconds += seconds
        before = self.now
        self.now += self._noisy(seconds)
        return self.now - before

    def step(self):
        name = "ngram" if self.passes is None else "draft"
        offers = [Offer(i, name, 0, MOST, int(self.passes is not None)) for i in range(self.batch)]
        counts = self.gamma.choose(offers, self.batch, 10**6)
        self.drafted.append(sum(counts))
        if self.passes is not None and any(counts):
            served = [sum(count > depth for count in counts) for depth in range(max(counts))]
            for number in served:
                self.gamma.passed(number, self._spend(UNIT * self.load * self.passes * self.curve(number)))
        rows = self.batch + sum(counts)
        self.gamma.began(rows)
        self._spend(UNIT * self.load * self.curve(rows))
        for offer, count in zip(offers, counts):
            self._learn(offer, count)
        self.gamma.ended(rows)
        self.steps += 1

    def _learn(self, offer, count):
        alpha = self.alpha(offer.request_id, self.steps)
        run = 0
        while run < MOST and self.random.random() < alpha:
            run += 1
        self.tokens += sum(alpha**n for n in range(count + 1))
        seen = count if self.passes is not None else min(min(run, count) + 1, MOST)
        self.gamma.learn(offer, min(run, seen), run < seen)

    def run(self, steps):
        """Tokens per second."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(steps):
            self.step()
        check = getattr(self.gamma, "check_integrity", None)
        if check is not None:
            check()
        return (self.tokens - tokens) / (self.seconds - seconds)


def fixed(curve, alpha, batch, passes, number):
    """Tokens per second of a fixed γ."""
    tokens = batch * sum(alpha**n for n in range(number + 1))
    return tokens / UNIT / (curve(batch * (1 + number)) + (passes or 0) * number * curve(batch))


@pytest.mark.parametrize("batch", [1, 8, 16, 64])
@pytest.mark.parametrize("passes", [None, 0.05, 0.2])
@pytest.mark.parametrize("name", CURVES)
def test_matches_the_best_fixed_number_and_never_loses_to_none(name, passes, batch):
    curve = CURVES[name]
    for alpha in ALPHAS:
        rates = [fixed(curve, alpha, batch, passes, number) for number in range(MOST + 1)]
        found = World(curve, alpha, batch, passes).run(STEPS[batch])
        # To be sure of a gain of 6% takes more probes than a hundredth of the time buys in so few steps.
        least = 0.94 if passes and max(rates) < 1.06 * rates[0] else 0.95
        assert found >= least * max(rates), (
            f"α {alpha}: {found / max(rates):.3f} of the best, {rates.index(max(rates))}"
        )
        assert found >= 0.965 * rates[0], f"α {alpha}: {found / rates[0]:.3f} of none"


@pytest.mark.parametrize("name", CURVES)
def test_without_a_profile_the_table_is_learned_at_a_bounded_loss(name):
    curve = CURVES[name]
    for batch in (1, 8):
        for alpha in ALPHAS:
            rates = [fixed(curve, alpha, batch, None, number) for number in range(MOST + 1)]
            found = World(curve, alpha, batch, profile=False).run(600)
            assert found >= 0.93 * max(rates), f"batch {batch}, α {alpha}: {found / max(rates):.3f} of the best"
            assert found >= 0.95 * rates[0], f"batch {batch}, α {alpha}: {found / rates[0]:.3f} of none"


@pytest.mark.parametrize("passes", [None, 0.1])
@pytest.mark.parametrize("batch", [1, 8])
def test_what_is_never_right_costs_a_hundredth(passes, batch):
    world = World(CURVES["measured"], 0.0, batch, passes)
    world.run(50)
    assert world.run(2000) >= 0.99 * fixed(CURVES["measured"], 0.0, batch, None, 0)
    if passes is None:
        assert sum(world.drafted) == 0, "what costs nothing to watch needs no probes"


@pytest.mark.parametrize("passes", [None, 0.1])
def test_follows_phases(passes):
    curve, length = CURVES["measured"], 400
    phases = (0.9, 0.0, 0.9)
    world = World(curve, lambda request, step: phases[step // length], passes=passes)
    for alpha in phases:
        world.run(100)
        best = max(fixed(curve, alpha, 1, passes, number) for number in range(MOST + 1))
        assert world.run(length - 100) >= 0.95 * best, f"α {alpha}, a hundred steps after it changed"
    found = world.tokens / world.seconds
    for number in range(MOST + 1):
        other = World(curve, world.alpha, passes=passes, gamma=FixedGamma(number))
        assert found > other.run(3 * length), f"γ = {number}"


@pytest.mark.parametrize("passes", [None, 0.05])
@pytest.mark.parametrize("batch", [2, 8])  # of 16 the gain is 5%, too little to be found in so few steps
def test_requests_that_differ_get_drafts_that_differ(passes, batch):
    curve = CURVES["measured"]

    def alpha(request, step):
        return 0.9 if request % 2 else 0.0

    found = World(curve, alpha, batch, passes).run(400)
    for number in range(MOST + 1):
        other = World(curve, alpha, batch, passes, gamma=FixedGamma(number)).run(20)
        assert found > 1.02 * other, f"γ = {number}: {found / other:.2f}"


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_a_machine_that_slows_down_changes_no_decision(alpha):
    curve = CURVES["measured"]
    world = World(curve, alpha)
    world.run(300)
    best = max(fixed(curve, alpha, 1, None, number) for number in range(MOST + 1))
    for load in (2.0, 0.8, 1.5):
        world.load = load
        assert world.run(300) * load >= 0.95 * best, f"load {load}"


def test_costs_that_grow_with_the_context_are_followed():
    curve = CURVES["measured"]
    world = World(curve, 0.7)
    best = max(fixed(curve, 0.7, 1, None, number) for number in range(MOST + 1))
    for part in range(10):
        world.load = 1 + part / 5
        assert world.run(100) * world.load >= 0.95 * best, f"load {world.load}"


def test_noise_does_not_flip_decisions():
    world = World(CURVES["flat, then steep"], 0.9)
    world.run(200)
    start = len(world.drafted)
    world.run(400)
    late = world.drafted[start:]
    assert late.count(3) > 0.9 * len(late), "four rows cost what one does, a fifth costs more than it brings"


def test_a_pause_says_nothing_about_costs():
    world = World(CURVES["flat, then steep"], 0.9)
    world.run(200)
    before = world.gamma.costs.seconds(4)
    world.gamma.began(4)
    world.now += 30.0
    world.gamma.ended(4)
    assert world.gamma.costs.seconds(4) < 1.1 * before
    start = len(world.drafted)
    world.run(20)
    assert world.drafted[start:].count(3) >= 18


def ready(alpha=0.9, costs=CURVES["measured"], proposer="ngram"):
    """A policy that knows the costs of up to 128 rows, and how often drafts are right."""
    gamma = AutoGamma(lambda: 0.0)
    for rows in range(1, 129):
        gamma.costs.seed(rows, UNIT * costs(rows))
        for _ in range(3):
            gamma.costs.observe(rows, UNIT * costs(rows))
    draws = random.Random(0)
    for _ in range(400):
        run = 0
        while run < MOST and draws.random() < alpha:
            run += 1
        gamma.learn(Offer(0, proposer, 0, MOST), run, run < MOST)
    return gamma


def test_chooses_no_more_than_is_offered_or_fits():
    gamma = ready(0.98)
    assert gamma.choose([Offer(1, "ngram", 0, 3), Offer(2, "ngram", 0, 1)], 2, 100) == [3, 1]
    assert gamma.choose([Offer(1, "ngram", 0, 3), Offer(2, "ngram", 0, 3)], 2, 3) == [2, 1]
    assert gamma.choose([Offer(1, "ngram", 0, 3)], 1, 0) == [0]
    assert gamma.choose([], 5, 100) == []


def test_drafts_nothing_before_it_knows_a_cost():
    assert AutoGamma(lambda: 0.0).choose([Offer(1, "ngram", 5, 8)], 1, 100) == [0]


def test_does_not_delay_the_rows_of_prompts_for_less_than_they_are_worth():
    gamma = ready(0.6, costs=lambda rows: rows)
    assert gamma.choose([Offer(1, "ngram", 0, 8)], 100, 100) == [0]
    tiles = ready(0.6, costs=lambda rows: 1 + (rows - 1) // 16)
    assert tiles.choose([Offer(1, "ngram", 0, 8)], 27, 100)[0] in (4, 5), "the second tile has room for five"


def test_looks_beyond_the_first_step_of_the_stairs():
    gamma = ready(0.95, costs=lambda rows: 1.0 if rows == 1 else 2.1)
    assert gamma.choose([Offer(1, "ngram", 0, 8)], 1, 100) == [8], "the second row pays only with those after it"


def test_a_draft_model_must_earn_its_time():
    gamma = ready(0.7, proposer="draft")
    assert gamma.choose([Offer(1, "draft", 0, 8, 1)], 1, 100)[0] >= 1, "passes that nobody timed: half a step"
    gamma.passed(1, 0.8 * UNIT)
    assert gamma.choose([Offer(1, "draft", 0, 8, 1)], 1, 100) == [0]


def test_takes_free_drafts_where_those_of_a_model_do_not_pay():
    gamma = ready(0.9)
    gamma.passed(1, 5 * UNIT)
    gamma.acceptance.learn(Offer(9, "draft", 0, 8), 8, False)
    draft, free = gamma.choose([Offer(1, "draft", 0, 8, 1), Offer(2, "ngram", 0, 8)], 2, 100)
    assert draft == 0 and free >= 3


def test_of_two_steps_in_flight_the_second_starts_when_the_first_has_ended(monkeypatch):
    now, seen = [0.0], []
    gamma = AutoGamma(lambda: now[0])
    monkeypatch.setattr(gamma.costs, "observe", lambda rows, seconds: seen.append((rows, seconds)))
    calls = [(0, "began", 4), (1, "began", 8), (10, "ended", 4), (13, "ended", 8), (20, "began", 2), (21, "ended", 2)]
    for at, call, rows in calls:
        now[0] = float(at)
        getattr(gamma, call)(rows)
    assert seen == [(4, 10.0), (8, 3.0), (2, 1.0)]


def test_a_step_that_was_given_up_says_nothing():
    now = [0.0]
    gamma = AutoGamma(lambda: now[0])
    gamma.ended(3)
    gamma.began(4)
    now[0] = 1.0
    gamma.ended(5)
    assert not gamma.costs
    gamma.began(4)
    gamma.began(6)
    now[0] = 3.0
    gamma.ended(6)
    assert gamma.costs.seconds(6) == pytest.approx(2.0)


def test_finished_requests_leave_nothing():
    gamma = ready()
    for number in range(100):
        offers = [Offer(number, "ngram", 3, 8), Offer(number + 1000, "draft", 0, 8, 1)]
        gamma.choose(offers, 2, 100)
        for offer in offers:
            gamma.learn(offer, 1, True)
        gamma.finish(number)
        gamma.finish(number + 1000)
        gamma.learn(offers[0], 0, True)
    gamma.check_integrity()
    assert gamma.acceptance._records == {} and gamma._probes == set()


def test_explains_itself():
    world = World(CURVES["measured"], 0.5, passes=0.05)
    world.run(100)
    assert set(world.gamma.explain()) == {"acceptance", "costs", "passes", "credit", "wait", "drafting"}


def test_fixed_is_cut_by_the_offer_and_shared_in_rounds():
    gamma = FixedGamma(3)
    offers = [Offer(1, "ngram", 0, 8), Offer(2, "ngram", 0, 2), Offer(3, "ngram", 0, 0)]
    assert gamma.choose(offers, 3, 100) == [3, 2, 0]
    assert gamma.choose(offers, 3, 4) == [2, 2, 0]
    assert gamma.choose(offers, 3, 1) == [1, 0, 0]
    assert gamma.choose(offers, 3, 0) == [0, 0, 0]
    assert FixedGamma(0).choose(offers, 3, 100) == [0, 0, 0]
