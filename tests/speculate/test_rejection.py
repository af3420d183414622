"""Algorithm 1: the target's distribution, by enumeration and by draws; streams that are one are seen."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from headrace.kernels.load import load_ops
from headrace.kernels.ops import SampleParams
from headrace.kernels.reference.sample import row_keys, sample, uniform
from headrace.kernels.reference.standard import standardized
from headrace.reproduce.speculative import PrefixPair, chi_square, direct, generate, induced, row_params
from headrace.speculate import rejection
from headrace.speculate.rejection import Rejection, acceptance, draft_params, residual

KNOBS: list[dict[str, float]] = [
    {},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.2, "temperature": 0.7},
    {"temperature": 1.6, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.0},
]
SEEDS = torch.arange(24_000)


def params(rows: int, **knobs: float) -> SampleParams:
    """Of seed 5, at positions 0, 1, …"""
    return row_params(torch.full((rows,), 5), torch.arange(rows), **knobs)


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(counts_of: torch.Tensor, pair: PrefixPair, **knobs: float) -> float:
    """How likely sequences are under the target."""
    counts = torch.bincount(pair.number(counts_of), minlength=pair.vocab_size**pair.length)
    return chi_square(counts, direct(pair, **knobs) * len(counts_of))


# ---- the distribution ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("vocab,gamma", [(2, 3), (3, 2), (4, 3), (5, 1), (5, 3)])
def test_sequences_have_the_target_s_probabilities(vocab, gamma, knobs):
    pair = PrefixPair(vocab, gamma + 1, seed=gamma)
    ours = induced(pair, **knobs)
    torch.testing.assert_close(ours, direct(pair, **knobs), rtol=0, atol=1e-14)
    assert ours.sum() == pytest.approx(1)


def test_a_wrong_residual_is_seen_by_enumeration(monkeypatch):
    monkeypatch.setattr("headrace.reproduce.speculative.residual", lambda p, q, lenience: p)
    pair = PrefixPair(4, 3)
    assert (induced(pair) - direct(pair)).abs().max() > 0.001


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_draws_follow_the_target(knobs):
    pair = PrefixPair(4, 4, seed=3)
    assert drawn(generate(pair, SEEDS, 2, Rejection(), **knobs), pair, **knobs) > 0.001
    wrong = generate(replaced(pair), SEEDS, 0, Rejection(), **knobs)
    assert drawn(wrong, pair, **knobs) < 1e-9, "the test could not fail"


def replaced(pair: PrefixPair) -> PrefixPair:
    """The draft model in the target's place."""
    other = PrefixPair(pair.vocab_size, pair.length)
    other.logits = (pair.logits[1], pair.logits[1])
    return other


@pytest.mark.parametrize(
    "same", [("ACCEPT", "DRAFT"), ("RESIDUAL", "DRAFT"), ("RESIDUAL", "ACCEPT"), ("ACCEPT", "RESIDUAL", "DRAFT")]
)
def test_streams_that_are_one_are_seen(monkeypatch, same):
    pair = PrefixPair(4, 3, seed=8)
    assert drawn(generate(pair, SEEDS, 2, Rejection()), pair) > 0.001
    for name in same[:-1]:
        monkeypatch.setattr(rejection, name, getattr(rejection, same[-1]))
    assert drawn(generate(pair, SEEDS, 2, Rejection()), pair) < 1e-9


@pytest.mark.parametrize("knobs", [{}, {"top_p": 0.8}], ids=str)
def test_point_masses_follow_the_target(knobs):
    """Drafts that a rule of the tokens alone gives."""
    pair, count = PrefixPair(4, 2, seed=3), len(SEEDS)
    first = torch.zeros(count, 0).long()
    draft = SEEDS % 4 if not knobs else torch.full((count,), 1)
    rows = torch.stack([pair.target(first), pair.target(draft[:, None])], 1).flatten(0, 1)
    at = row_params(SEEDS.repeat_interleave(2), torch.arange(2).repeat(count), **knobs)
    token = Rejection().verify(rows, at, draft[:, None].tolist(), [None] * count).view(count, 2)
    right = token[:, 0] == draft
    after = row_params(SEEDS, torch.ones(count).long(), **knobs)
    token[:, 1] = torch.where(right, token[:, 1], sample(pair.target(token[:, :1]), after))
    assert drawn(token, pair, **knobs) > 0.001
    p = standardized(pair.at(0)[0], params(1, **knobs))[0]
    assert right.double().mean().item() == pytest.approx(p[draft].mean().item(), abs=0.01)


@pytest.mark.parametrize("lenience", [0.9, 0.5, 0.1])
def test_lenience_accepts_more_and_is_bounded(lenience):
    more = 0.0
    for seed in range(20):
        pair = PrefixPair(5, 2, seed)
        p, q = (standardized(x, params(1)) for x in pair.at(0))
        rows = p.expand(5, 5), q.expand(5, 5), torch.arange(5)
        exact, lenient = acceptance(*rows), acceptance(*rows, lenience)
        assert (lenient >= exact).all()
        more += (q[0] * (lenient - exact)).sum().item() / 20
        first = induced(pair, lenience).view(5, 5).sum(dim=1)
        assert (first <= p[0] / lenience + 1e-12).all()
        assert first.sum() == pytest.approx(1)
    assert more > 0.02
    pair = PrefixPair(4, 3, seed=8)
    counts = torch.bincount(pair.number(generate(pair, SEEDS, 2, Rejection(lenience))), minlength=64)
    assert chi_square(counts, direct(pair) * len(SEEDS)) < 1e-9, "another distribution"


def test_lenient_draws_are_those_of_the_closed_form():
    """Of one step's first token, which no later step changes."""
    pair = PrefixPair(4, 3, seed=8)
    counts = torch.bincount(generate(pair, SEEDS, 2, Rejection(0.6))[:, 0], minlength=4)
    assert chi_square(counts, induced(pair, 0.6).view(4, -1).sum(1) * len(SEEDS)) > 0.001


# ---- decisions -------------------------------------------------------------------------------------------------


def test_decisions_by_hand(monkeypatch):
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    q = torch.tensor([[0.25, 0.5, 0.0, 0.25]])
    assert [acceptance(p, q, torch.tensor([d])).item() for d in range(4)] == [1, 0.5, 1, 0]
    assert acceptance(p, q, torch.tensor([1]), 0.625).item() == pytest.approx(0.8)
    assert residual(p, q).tolist() == [[0.5, 0, 0.5, 0]]
    assert residual(p, q, 0.5)[0].tolist() == pytest.approx([0.375 / 0.625, 0, 0.25 / 0.625, 0])
    assert residual(p, p).tolist() == p.tolist(), "nothing is left: p"

    z = p.double().log().float().expand(2, 4)
    for u, kept in ((0.49, True), (0.51, False)):
        monkeypatch.setattr(rejection, "uniform", lambda key_R, u=u: torch.full((len(key_R),), u))
        token = Rejection().verify(z, params(2), [[1]], [q])[0].item()
        assert (token == 1) == kept and (kept or token in (0, 2))
        assert Rejection(0.9).verify(z, params(2), [[1]], [q])[0].item() == 1  # .25 / (.9 · .5) = .56


def test_a_draft_that_rounding_alone_would_reject_is_kept():
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    q = p * (1 + 1e-15) + torch.tensor([[0, 0, 1e-300]], dtype=torch.float64)
    assert acceptance(p, q, torch.tensor([0])).item() == 1
    assert acceptance(p, q, torch.tensor([2])).item() == 0, "never what the target forbids"
    assert residual(p, q).tolist() == p.tolist()


def test_a_rejected_draft_is_not_drawn_again():
    """A caller tells accepted from rejected by the token."""
    count = 4000
    z, w = logits(2 * count, 6, 1), logits(count, 6, 2)
    at = row_params(torch.arange(2 * count), torch.arange(2 * count), top_k=4)
    own = at.take(list(range(0, 2 * count, 2)))
    draft, q = sample(w, draft_params(own)), standardized(w, own)
    token = Rejection().verify(z, at, draft[:, None].tolist(), list(q[:, None]))[::2]
    odds = acceptance(standardized(z[::2], own), q, draft)
    keys = rejection._keys(own, rejection.ACCEPT)
    assert torch.equal(token == draft, uniform(keys) < odds)
    assert 0.2 < (token == draft).double().mean() < 0.8


def test_banned_tokens_never_come():
    z = logits(400, 5, 4)
    z[:, 2] = -math.inf
    z[::4] = torch.tensor([-math.inf] * 4 + [1.0])
    token = Rejection(0.01).verify(z, params(400), [[2, 2, 2]] * 100, [None] * 100).view(100, 4)
    assert (token[:, 0] == 4).all() and (token[:, 3] != 2).all()


def test_rows_without_noise_compare_the_best_tokens():
    z = logits(4, 9, 6)
    best = z.argmax(1).tolist()
    for given in (None, torch.full((3, 9), 1 / 9)):
        for drafts, stand in ((best[:3], 4), ([best[0], (best[1] + 1) % 9, best[2]], 2)):
            token = Rejection().verify(z, params(4, temperature=0.0), [drafts], [given]).tolist()
            assert token[:stand] == best[:stand]


# ---- rows ------------------------------------------------------------------------------------------------------


def test_rows_without_drafts_and_bonus_rows_have_the_ordinary_noise():
    z, at = logits(6, 50), params(6, top_k=20)
    plain = sample(z, at)
    assert torch.equal(Rejection().verify(z, at, [[]] * 6, [None] * 6), plain)
    assert torch.equal(Rejection().verify(z, at, [[]] * 6, [None, torch.empty(0, 50)] * 3), plain)
    token = Rejection().verify(z, at, [[4, 4], [], [7]], [None, None, None])
    assert torch.equal(token[[2, 3, 5]], plain[[2, 3, 5]])
    assert torch.equal(load_ops("cpu").sample(z, at), plain)
    assert Rejection().verify(torch.empty(0, 50), params(0), [], []).shape == (0,)


def test_a_group_stands_alone():
    z, at = logits(10, 30), params(10, temperature=0.9, top_p=0.95)
    drafts = [[3, 8], [], [1, 2, 3], [9]]
    w = logits(3, 30, seed=9)
    q: list[torch.Tensor | None] = [None, None, standardized(w, params(3)), None]
    together = Rejection().verify(z, at, drafts, q)
    start = 0
    for group, given in zip(drafts, q):
        rows = list(range(start, start + len(group) + 1))
        alone = Rejection().verify(z[rows], at.take(rows), [group], [given])
        assert torch.equal(alone, together[rows])
        start += len(rows)


def test_the_draft_s_stream_is_another_draw():
    z, at = logits(1, 100).expand(3000, -1), row_params(torch.arange(3000), torch.zeros(3000).long())
    own = draft_params(at)
    assert replace(own, seed_R=at.seed_R) == at
    one, other = sample(z, at), sample(z, own)
    p = standardized(z[:1], params(1))[0]
    assert (one == other).double().mean().item() == pytest.approx((p * p).sum().item(), abs=0.03)


def test_uniform_numbers_are_uniform():
    u = uniform(row_keys(torch.arange(50_000), torch.tensor(0), torch.tensor(3))).sort().values
    assert u[0] > 0 and u[-1] < 1
    gap = (u - (torch.arange(len(u)) + 0.5) / len(u)).abs().max()
    assert gap < 1.63 / math.sqrt(len(u))  # Kolmogorov-Smirnov, 1%


def test_standardized_is_what_sample_draws():
    count = 40_000
    z = torch.tensor([[2.0, -1.0, 1.5, math.nan, 0.0, 1.0, -math.inf]])
    for knobs in KNOBS:
        at = row_params(torch.arange(count), torch.zeros(count).long(), **knobs)
        p = standardized(z, row_params(torch.zeros(1).long(), torch.zeros(1).long(), **knobs))[0]
        counts = torch.bincount(sample(z.expand(count, -1), at), minlength=7)
        assert p.sum() == pytest.approx(1) and chi_square(counts, p * count) > 0.001
    nothing = torch.full((2, 3), -math.inf)
    assert standardized(nothing, params(2)).tolist() == [[1, 0, 0]] * 2
    assert standardized(torch.empty(0, 3), params(0)).shape == (0, 3)


@pytest.mark.parametrize(
    "rows,drafts,q,message",
    [
        (4, [[1, 2]], [None], "need 3 rows"),
        (3, [[1, 2]], [], "need 1 distributions"),
        (3, [[1, 8]], [None], "not a token"),
        (3, [[1, -1]], [None], "not a token"),
        (3, [[1, 2]], [torch.ones(2, 7)], "q of group 0"),
        (3, [[1, 2]], [torch.ones(1, 8)], "q of group 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    rows: int, drafts: list[list[int]], q: Sequence[torch.Tensor | None], message: str
):
    with pytest.raises(ValueError, match=message):
        Rejection().verify(torch.zeros(rows, 8), params(rows), drafts, q)


def test_bad_shapes_and_leniences_are_refused():
    with pytest.raises(ValueError, match="must be"):
        Rejection().verify(torch.zeros(3), params(3), [[1, 2]], [None])
    with pytest.raises(ValueError, match="temperature_R"):
        Rejection().verify(torch.zeros(3, 8), params(2), [[1, 2]], [None])
    for value in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="lenience"):
            Rejection(value)
