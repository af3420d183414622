"""Estimates of how likely drafts are right."""

import random

import pytest

from headrace.speculate.acceptance import Acceptance
from headrace.speculate.base import Offer


def feed(acceptance, offer, alphas, times, seed=0):
    """Learn `times` drafts whose tokens are right with these chances, place by place."""
    draws = random.Random(seed)
    for _ in range(times):
        acceptance.marginals(offer)
        run = 0
        while run < offer.most and draws.random() < alphas[min(run, len(alphas) - 1)]:
            run += 1
        acceptance.learn(offer, run, run < offer.most)
    acceptance.check_integrity()


def test_expects_little_before_it_has_seen_anything():
    found = Acceptance().marginals(Offer(1, "ngram", 9, 8))
    assert found == pytest.approx([0.1]), "of the second, a hundredth is not worth a thought"


def test_a_few_right_drafts_are_not_yet_trusted():
    acceptance = Acceptance()
    offer = Offer(1, "ngram", 0, 1)
    rates = []
    for _ in range(8):
        acceptance.learn(offer, 1, False)
        rates += acceptance.marginals(offer)
    assert rates == sorted(rates) and rates[0] < 0.5 and 0.6 < rates[-1] < 0.95


def test_learns_each_place():
    acceptance = Acceptance()
    offer = Offer(1, "ngram", 0, 4)
    feed(acceptance, offer, [0.5, 0.9, 0.7, 0.7], 600)
    found = acceptance.marginals(offer)
    assert found == pytest.approx([0.5, 0.45, 0.315, 0.22], abs=0.1)
    assert all(a > b for a, b in zip(found, found[1:]))


def test_a_place_that_was_never_reached_is_like_the_one_before():
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.learn(Offer(1, "draft", 0, 1), 1, False)
    first, second, third = acceptance.marginals(Offer(1, "draft", 0, 3))
    assert second == pytest.approx(first**2, rel=0.05) and third == pytest.approx(first**3, rel=0.05)


def test_longer_matches_are_apart():
    acceptance = Acceptance()
    for turn in range(50):
        feed(acceptance, Offer(turn, "ngram", 2, 1), [0.1], 4, seed=turn)
        feed(acceptance, Offer(turn, "ngram", 20, 1), [0.9], 4, seed=turn)
    [short], [long] = (acceptance.marginals(Offer(99, "ngram", match, 1)) for match in (2, 20))
    assert short < 0.3 and long > 0.7


def test_proposers_are_apart():
    acceptance = Acceptance()
    feed(acceptance, Offer(1, "ngram", 0, 1), [1.0], 100)
    assert acceptance.marginals(Offer(1, "draft", 0, 1)) == pytest.approx([0.7])


def test_requests_that_are_alike_have_equal_chances():
    acceptance = Acceptance()
    for turn in range(30):
        for request in range(16):
            feed(acceptance, Offer(request, "ngram", 0, 4), [0.7], 1, seed=turn * 16 + request)
    found = {tuple(acceptance.marginals(Offer(request, "ngram", 0, 4))) for request in range(16)}
    assert len(found) <= 6


def test_a_request_that_differs_is_told_from_the_rest():
    acceptance = Acceptance()
    for turn in range(30):
        for request in range(8):
            feed(acceptance, Offer(request, "ngram", 0, 2), [0.9 if request < 4 else 0.05], 1, seed=turn * 8 + request)
    for request in range(8):
        [first, *_] = [*acceptance.marginals(Offer(request, "ngram", 0, 2)), 0.0]
        assert first > 0.7 if request < 4 else first < 0.2


def test_follows_a_change_of_phase():
    acceptance = Acceptance()
    offer = Offer(1, "ngram", 0, 4)
    feed(acceptance, offer, [0.95], 300)
    feed(acceptance, offer, [0.0], 40)
    assert acceptance.marginals(offer)[0] < 0.15
    feed(acceptance, offer, [0.95], 40)
    assert acceptance.marginals(offer)[0] > 0.65


def test_counts_do_not_overflow():
    acceptance = Acceptance()
    offer = Offer(1, "ngram", 0, 8)
    feed(acceptance, offer, [0.8], 10_000)
    assert acceptance.marginals(offer)[0] == pytest.approx(0.8, abs=0.15)


def test_long_offers_share_the_last_place():
    acceptance = Acceptance()
    offer = Offer(1, "ngram", 0, 40)
    for _ in range(200):
        acceptance.learn(offer, 40, False)
    found = acceptance.marginals(offer)
    assert len(found) == 40 and found[-1] > 0.5


def test_a_finished_request_leaves_nothing():
    acceptance = Acceptance()
    offer = Offer(1, "ngram", 0, 8)
    feed(acceptance, offer, [0.5], 10)
    acceptance.finish(1)
    acceptance.finish(2)
    acceptance.learn(offer, 1, True)
    acceptance.learn(offer, 0, False)
    assert acceptance.explain()["requests"] == 0
