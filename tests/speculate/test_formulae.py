"""What speculative decoding gains, in closed form: the paper's table, the best γ by brute force, both α by draws."""

import math
import random

import pytest
import torch

from headrace.kernels.reference.sample import gumbel, row_keys
from headrace.reproduce.speculative import CLOSENESS, PUBLISHED, random_logits
from headrace.speculate import formulae as paper

GRID = [(a / 40, c / 40) for a in range(41) for c in range(41)]


def test_table_1():
    for (alpha, gamma), (work, speed) in PUBLISHED.items():
        assert paper.operations(alpha, gamma, 0) == pytest.approx(work, abs=0.005)
        assert paper.speedup(alpha, gamma, 0) == pytest.approx(speed, abs=0.005)


@pytest.mark.parametrize("gamma", [0, 1, 2, 7, 31])
def test_the_sums_are_the_paper_s_quotients(gamma):
    for alpha in (0.0, 0.1, 0.5, 0.93):
        tokens = (1 - alpha ** (gamma + 1)) / (1 - alpha)
        assert paper.tokens_per_step(alpha, gamma) == pytest.approx(tokens)
        assert paper.speedup(alpha, gamma, 0.07) == pytest.approx(tokens / (gamma * 0.07 + 1))
        assert paper.operations(alpha, gamma, 0.02) == pytest.approx((gamma * 0.02 + gamma + 1) / tokens)
    assert paper.tokens_per_step(1.0, gamma) == gamma + 1
    assert paper.tokens_per_step(1 - 1e-12, gamma) == pytest.approx(gamma + 1, rel=1e-9)


@pytest.mark.parametrize("alpha,gamma", [(-0.1, 1), (1.1, 1), (math.nan, 1), (0.5, -1)])
def test_what_is_no_probability_is_refused(alpha, gamma):
    with pytest.raises(ValueError, match="α must be"):
        paper.tokens_per_step(alpha, gamma)


@pytest.mark.parametrize("most", [0, 1, 5, 48])
def test_the_best_gamma_is_that_of_all(most):
    for alpha, c in GRID:
        assert paper.best_gamma(alpha, c, most) == max(
            range(most + 1), key=lambda gamma: paper.speedup(alpha, gamma, c)
        )
    assert paper.best_gamma(1.0, 0.0, most) == most


def test_it_pays_iff_alpha_is_above_c():
    for alpha, c in GRID:
        gamma = paper.best_gamma(alpha, c, 48)
        assert paper.improves(alpha, c) == (gamma > 0)
        if gamma:
            assert paper.speedup(alpha, gamma, c) >= paper.least_speedup(alpha, c) > 1


def random_pair(draw: random.Random, vocab: int) -> list[list[float]]:
    """Two distributions, some of whose tokens have none of one or of both."""
    pair = [[draw.random() ** 3 * (draw.random() > 0.2) for _ in range(vocab)] for _ in range(2)]
    return [[x / sum(row) for x in row] for row in pair]


def test_alpha_is_the_share_of_draws_that_agree():
    draw, count = random.Random(3), 60_000
    noise = gumbel(row_keys(torch.tensor(1), torch.tensor(0), torch.arange(count)), 6)
    for _ in range(4):
        p, q = random_pair(draw, 6)
        first, second = (torch.tensor(x).log() + noise for x in (p, q))
        agree = (first.argmax(1) == second.argmax(1)).double().mean().item()
        assert paper.alpha_coupled(p, q) == pytest.approx(agree, abs=0.007)  # 3.4 standard errors


def test_bounds_of_alpha():
    draw = random.Random(4)
    for _ in range(200):
        p, q = random_pair(draw, 8)
        rejection, coupled = paper.alpha_rejection(p, q), paper.alpha_coupled(p, q)
        distance = sum(abs(a - b) for a, b in zip(p, q)) / 2
        assert rejection == pytest.approx(1 - distance)
        assert (1 - distance) / (1 + distance) - 1e-12 <= coupled <= rejection + 1e-12
        assert paper.alpha_coupled(q, p) == pytest.approx(coupled)
        point = [float(i == 2) for i in range(8)]
        assert paper.alpha_coupled(p, point) == pytest.approx(paper.alpha_rejection(p, point)) == pytest.approx(p[2])
        assert paper.alpha_coupled(p, p) == pytest.approx(1)
    assert paper.alpha_coupled([1.0, 0.0], [0.0, 1.0]) == paper.alpha_rejection([1.0, 0.0], [0.0, 1.0]) == 0
    with pytest.raises(ValueError):
        paper.alpha_coupled([1.0], [0.5, 0.5])


@pytest.mark.parametrize("closeness,wanted", list(zip(CLOSENESS, [(0.835, 0.797), (0.640, 0.571), (0.584, 0.535)])))
def test_coupling_costs_little_of_alpha(closeness, wanted):
    """Over random pairs at 200 tokens: Algorithm 1's α, and what the same noise leaves of it."""
    spread, noise = closeness
    p, q = (logits.double().softmax(1).tolist() for logits in random_logits(24, 200, spread, noise, seed=5))
    rejection = sum(map(paper.alpha_rejection, p, q)) / len(p)
    coupled = sum(map(paper.alpha_coupled, p, q)) / len(p)
    assert rejection == pytest.approx(wanted[0], abs=0.03)
    assert rejection - coupled == pytest.approx(wanted[0] - wanted[1], abs=0.02)
