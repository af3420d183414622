"""Sampling on the CPU: the reference's tokens, exact cuts, the right distribution, and independent rows."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.cpu import sample as cpu
from headrace.kernels.load import load_ops
from headrace.kernels.ops import SampleParams
from headrace.kernels.reference import ReferenceOps
from headrace.kernels.reference import sample as reference
from headrace.kernels.shards import vocab_bounds

OPS = load_ops("cpu", threads=2)
REFERENCE = ReferenceOps()
FIELDS = SampleParams.__slots__


def params(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, choice=0, position=None) -> SampleParams:
    """The same parameters for every row, at positions 0, 1, … unless given."""

    def full(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(rows).contiguous()

    return SampleParams(
        full(temperature, torch.float32),
        full(top_k, torch.int64),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
        full(seed, torch.int64),
        full(choice, torch.int64),
        torch.arange(rows) if position is None else full(position, torch.int64),
    )


def take(p: SampleParams, rows: torch.Tensor) -> SampleParams:
    return SampleParams(**{name: getattr(p, name)[rows] for name in FIELDS})


def logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def naive_kept(z: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int] | None:
    """The kept tokens by their definition, in exact sums; None where p falls too near to a cut to tell."""
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    order = order[:top_k] if top_k else order
    weight = {i: Fraction(math.exp((z[i] - max(z)) / temperature)) for i in order}
    total, reached, kept = sum(weight.values()), Fraction(0), []
    for i in order:
        kept.append(i)
        reached += weight[i]
        if top_p < 1 and abs(reached - Fraction(top_p) * total) < total / 10**5:
            return None
        if top_p < 1 and reached >= Fraction(top_p) * total:
            break
    if any(abs(weight[i] - Fraction(min_p)) < 1e-5 for i in kept) and min_p > 0:
        return None
    return {i for i in kept if weight[i] >= min_p}


# ---- noise -----------------------------------------------------------------------------------------------------


def test_the_hash_is_splitmix64():
    """The generator's published first outputs, from state 0."""
    states = torch.tensor([0x9E3779B97F4A7C15 - 2**64, 2 * (0x9E3779B97F4A7C15 - 2**64) + 2**64])
    first, second = (x % 2**64 for x in reference.mix(states).tolist())
    assert (first, second) == (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)


@pytest.mark.parametrize("key", [(0, 0, 0), (-1, 1, 5), (2**63 - 1, 255, 131071), (-(2**63), 3, 1)])
def test_noise_equals_the_references(key):
    ours = np.empty(4096, np.float32)
    cpu.gumbel(*key, ours)
    theirs = reference.gumbel(reference.row_keys(*(torch.tensor([x]) for x in key)), 4096)[0]
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-6, atol=1e-6)


def test_noise_is_gumbel_and_depends_on_every_part_of_its_key():
    keys = [(7, 0, 11), (8, 0, 11), (7, 1, 11), (7, 0, 12), (7 + 2**40, 0, 11), (11, 0, 7)]
    rows = np.empty((len(keys), 1 << 16), np.float32)
    for key, row in zip(keys, rows):
        cpu.gumbel(*key, row)
        ranks = np.sort(np.exp(-np.exp(-row.astype(np.float64))))  # uniform, if the row is Gumbel
        gap = np.abs(ranks - (np.arange(row.size) + 0.5) / row.size).max()
        assert gap < 1.63 / math.sqrt(row.size)  # Kolmogorov-Smirnov, 1%
    assert np.isfinite(rows).all()
    assert np.abs(np.corrcoef(rows) - np.eye(len(keys))).max() < 5 / math.sqrt(rows.shape[1])


# ---- tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 7, 8, 513, 32000])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3, "top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 1.7, "top_k": 200, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1e-30},
        {"temperature": 100.0},
    ],
    ids=str,
)
def test_tokens_equal_the_references(vocab, knobs):
    z, p = logits(12, vocab), params(12, seed=-5, **knobs)
    assert torch.equal(OPS.sample(z, p), REFERENCE.sample(z, p))


knob_sets = st.tuples(
    st.sampled_from([0.25, 1.0, 1.5]),
    st.integers(0, 14),
    st.floats(0.0625, 1.0, width=32),
    st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([-math.inf, -2.0, -0.5, -0.0, 0.0, 0.25, 1.0, 1.75]), min_size=1, max_size=14), knob_sets
)
def test_exactly_the_right_tokens_are_kept(row, knobs):
    """With the noise known, the token is the best of the naively kept ones: one too many or too few would show."""
    temperature, top_k, top_p, min_p = knobs
    kept = naive_kept(row, *knobs) if max(row) > -math.inf else {0}
    if kept is None:
        return
    draws = 128
    z = torch.tensor([row] * draws)
    tokens = OPS.sample(z, params(draws, temperature, top_k, top_p, min_p)).tolist()
    assert set(tokens) <= kept
    keys = reference.row_keys(torch.full((draws,), 1), torch.zeros(draws), torch.arange(draws))
    noisy = ((z - max(row)) / temperature if max(row) > -math.inf else z) + reference.gumbel(keys, len(row))
    for token, values in zip(tokens, noisy.tolist()):
        assert token == max(sorted(kept), key=lambda i: values[i])


def test_top_p_takes_the_shortest_prefix_of_equal_tokens():
    z = torch.zeros(4000, 1000)
    for p, count in ((0.5, 500), (0.25, 250), (0.0009765625, 1), (1.0, 1000)):
        tokens = OPS.sample(z, params(4000, top_p=p))
        assert tokens.max() < count
        assert len(set(tokens.tolist())) > 0.95 * min(count, 900)


@pytest.mark.parametrize("knobs", [{}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.6, "min_p": 0.05}], ids=str)
@pytest.mark.parametrize("walk", ["position", "seed", "choice"])
def test_draws_follow_the_distribution(knobs, walk):
    """Chi-square over 20,000 draws whose keys differ in one part only."""
    z, draws = logits(1, 12, seed=3, spread=1.0), 20_000
    index = torch.arange(draws)
    p = params(draws, **{"position": 9, walk: index}, **knobs)
    counts = torch.bincount(OPS.sample(z.expand(draws, -1).contiguous(), p), minlength=12).double()
    kept = naive_kept(
        z[0].tolist(),
        knobs.get("temperature", 1.0),
        knobs.get("top_k", 0),
        knobs.get("top_p", 1.0),
        knobs.get("min_p", 0.0),
    )
    assert kept is not None
    weight = torch.exp(z[0].double() / knobs.get("temperature", 1.0))
    weight = torch.where(torch.tensor([i in kept for i in range(12)]), weight, 0.0)
    expected = weight / weight.sum() * draws
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum().item()
    freedom = len(kept) - 1
    assert chi_square < freedom + 3.1 * math.sqrt(2 * freedom) + 6  # beyond the 99.9% point for 1 … 11
    wrong = torch.roll(expected, 1)[expected > 0]
    assert ((counts[expected > 0] - wrong) ** 2 / wrong.clamp(min=1)).sum() > 1000, "the test could not fail"


def test_a_row_stands_alone():
    z, p = logits(9, 1003), params(9, temperature=0.8, top_k=50, top_p=0.9, position=torch.arange(9) * 3)
    z[4] = torch.nan
    together = OPS.sample(z, p)
    back = torch.tensor([8, 3, 3, 0, 7, 1, 2, 6, 5])
    assert torch.equal(OPS.sample(z[back], take(p, back)), together[back])
    single = load_ops("cpu", threads=1)
    for row in range(9):
        at = torch.tensor([row])
        assert torch.equal(single.sample(z[at], take(p, at)), together[at])


def test_greedy_and_broken_rows():
    inf, nan = math.inf, math.nan
    rows = [
        ([1, 3, 3, 2], 1),
        ([nan, 1, nan, 1], 1),
        ([-inf] * 4, 0),
        ([nan] * 4, 0),
        ([nan, -inf, nan, -inf], 0),
        ([-inf, -5, -inf, -inf], 1),
        ([1, inf, 2, inf], 1),
        ([-0.0, 0.0, -1, -1], 0),
        ([0] * 8 + [9], 8),
    ]
    for row, token in rows:
        z = torch.tensor([row], dtype=torch.float32)
        for ops in (OPS, REFERENCE):
            assert ops.sample(z, params(1, temperature=0.0)).tolist() == [token]
            assert ops.sample(z, params(1, top_k=1)).tolist() == [token]
            assert ops.sample(z, params(1, temperature=1e-20, top_p=0.5)).tolist() == [token]
    for ops in (OPS, REFERENCE):
        assert ops.sample(torch.empty(0, 8), params(0)).shape == (0,)


# ---- log-sum-exp, scores, best tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("vocab,shards", [(1, 1), (172, 4), (512, 4), (1003, 2), (32000, 8), (130, 4)])
def test_logsumexp_is_close_to_float64(vocab, shards):
    z = logits(5, vocab, spread=8.0)
    z[1, vocab // 3 :] = -math.inf
    z[2] = -math.inf
    z[3] += 1e30
    got = OPS.logsumexp(z, vocab_bounds(vocab, shards))
    torch.testing.assert_close(got.double(), torch.logsumexp(z.double(), dim=1), rtol=3e-7, atol=1e-6)
    if vocab > 3:
        assert got[2] == -math.inf


def test_logsumexp_depends_on_its_row_and_shards_alone():
    z, bounds = logits(40, 1000), vocab_bounds(1000, 4)
    together = OPS.logsumexp(z, bounds)
    for row in (0, 17, 39):
        assert torch.equal(load_ops("cpu", threads=1).logsumexp(z[row : row + 1], bounds), together[row : row + 1])
    assert torch.equal(
        OPS.logsumexp(z[:, :900].contiguous(), (0, 256, 512, 768, *[900] * 5)),
        OPS.logsumexp(z[:, :900].contiguous(), (0, 256, 512, 768, 900)),
    )
    assert not torch.equal(OPS.logsumexp(z, (0, 1000)), together), "other shards: other bits, or this shows nothing"


def test_scores_and_best_tokens_against_a_sort():
    z = torch.randint(-9, 9, (6, 300), generator=torch.Generator().manual_seed(2)) / 4
    z[1, 5:] = -math.inf
    z[2] = -math.inf
    lse = OPS.logsumexp(z, (0, 300))
    for k in (1, 5, 20, 400):
        values, ids = OPS.top_logprobs(z, lse, k)
        assert ids.shape == (6, min(k, 300))
        for row in range(6):
            best = sorted(range(300), key=lambda i: (-z[row, i].item(), i))[:k]
            assert ids[row].tolist() == best
            expected = torch.where(z[row, best] == -math.inf, -math.inf, z[row, best] - lse[row])
            assert torch.equal(values[row], expected)
    for row in range(6):
        order = sorted(range(300), key=lambda i: (-z[row, i].item(), i))
        for token in (0, 3, 5, 299):
            logprob, rank = OPS.score(z[row : row + 1], lse[row : row + 1], torch.tensor([token]))
            assert rank.item() == order.index(token) + 1
            wanted = z[row, token] - lse[row] if z[row, token] > -math.inf else torch.tensor(-math.inf)
            assert torch.equal(logprob[0], wanted)


def test_scores_equal_the_references():
    z, targets = logits(8, 2000), torch.arange(8) * 200
    z[3, 700], z[0, 9] = math.nan, math.inf
    lse = torch.logsumexp(torch.nan_to_num(z, nan=-math.inf, posinf=3e38), dim=1)
    for ours, theirs in (
        (OPS.score(z, lse, targets), REFERENCE.score(z, lse, targets)),
        (OPS.top_logprobs(z, lse, 7), REFERENCE.top_logprobs(z, lse, 7)),
    ):
        for a, b in zip(ours, theirs):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
