"""Eight lanes: the order of every sum, exp and log, rounding, and nothing read or written past the end."""

import numba
import numpy as np
import pytest
import torch

from headrace.kernels.cpu import simd
from headrace.kernels.cpu.memory import load1, load8, load8n, pointer, store1, store8, store8n
from headrace.kernels.cpu.simd import exp1, exp8, fma1, fma8, hmax8, hsum8, log1, log8, sqrt8, zero8

SPECIAL = np.array(
    [
        np.inf,
        -np.inf,
        np.nan,
        0.0,
        -0.0,
        1.0,
        -1.0,
        1e-45,
        -1e-45,
        1.2e-38,
        3e38,
        -3e38,
        88.7,
        88.8,
        -87.4,
        -103.9,
        -104.1,
        -1e9,
    ],
    np.float32,
)


@numba.njit
def apply8(x, exps, logs):
    for i in range(0, x.size, 8):
        store8(exps, i, exp8(load8(x, i)))
        store8(logs, i, log8(load8(x, i)))


@numba.njit
def apply1(x, exps, logs):
    for i in range(x.size):
        exps[i] = exp1(x[i])
        logs[i] = log1(x[i])


@numba.njit
def dot(x, w, count):
    acc = zero8()
    whole = count & ~7
    for k in range(0, whole, 8):
        acc = fma8(load8(x, k), load8(w, k), acc)
    return hsum8(fma8(load8n(x, whole, count - whole), load8n(w, whole, count - whole), acc))


@numba.njit
def reduce(x, out):
    p = pointer(x)
    for i in range(8):
        out[0, i], out[1, i] = hsum8(load8(p, 8 * i)), hmax8(load8(p, 8 * i))


@numba.njit
def move8(source, target, count):
    whole = count & ~7
    for k in range(0, whole, 8):
        store8(target, k, load8(source, k))
    store8n(target, whole, load8n(source, whole, count - whole), count - whole)


@numba.njit
def move1(source, target, count):
    for k in range(count):
        store1(target, k, load1(source, k))


@numba.njit
def roots8(x, out):
    for i in range(0, x.size, 8):
        store8(out, i, sqrt8(load8(x, i)))


@numba.njit
def fuse(a, b, c):
    return fma1(a, b, c)


def bits(array: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


def as_stored(x: torch.Tensor) -> np.ndarray:
    view = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}[x.dtype]
    return x.view(view).numpy()


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    x = np.concatenate([np.linspace(-110, 90, 60_000), np.geomspace(1e-44, 3e38, 60_000), SPECIAL]).astype(np.float32)
    return np.pad(x, (0, -x.size % 8))


def test_exp_and_log_are_within_an_ulp_or_so(points):
    exps, logs = np.empty_like(points), np.empty_like(points)
    apply8(points, exps, logs)
    with np.errstate(all="ignore"):
        for got, want in ((exps, np.exp(points.astype(np.float64))), (logs, np.log(points.astype(np.float64)))):
            rounded = want.astype(np.float32)
            assert np.array_equal(np.isnan(got), np.isnan(rounded))
            assert np.array_equal(got[np.isinf(rounded)], rounded[np.isinf(rounded)])
            plain = np.isfinite(rounded) & (np.abs(rounded) > 1.2e-38)
            ulps = np.abs(got[plain] - want[plain]) / np.spacing(np.abs(rounded[plain]))
            assert ulps.max() < 1.5
    assert (exps[points < -104.0] == 0.0).all()
    assert (exps[points == 0.0] == 1.0).all()
    assert (logs[points == 1.0] == 0.0).all()


def test_scalar_and_vector_forms_have_equal_bits(points):
    eights, ones = np.empty((2, points.size), np.float32), np.empty((2, points.size), np.float32)
    apply8(points, eights[0], eights[1])
    apply1(points, ones[0], ones[1])
    assert np.array_equal(bits(eights), bits(ones))


def test_a_root_is_the_nearest(points):
    roots = np.empty_like(points)
    roots8(points, roots)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(bits(roots), bits(np.sqrt(points)))


def test_fma_rounds_once():
    a = np.float32(1 + 2**-12)
    assert fuse(a, a, np.float32(-1 - 2**-11)) == np.float32(2**-24)


def test_hsum_adds_at_distance_4_then_2_then_1():
    scale = np.tile(10.0 ** np.arange(8), 8)
    x = (np.random.default_rng(0).standard_normal(64) * scale).astype(np.float32)
    out = np.empty((2, 8), np.float32)
    reduce(x, out)
    for i, lanes in enumerate(x.reshape(8, 8)):
        four = lanes[:4] + lanes[4:]
        two = four[:2] + four[2:]
        assert out[0, i] == two[0] + two[1]
        assert out[1, i] == lanes.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 33, 100])
def test_a_dot_is_eight_lanes_of_fused_sums(count, dtype):
    generator = torch.Generator().manual_seed(count)
    x, w = torch.randn(count, generator=generator), torch.randn(count, generator=generator).to(dtype)
    # What follows the end must not be read: NaN there would spread.
    x_guarded, w_guarded = torch.full((count + 16,), torch.nan), torch.full((count + 16,), torch.nan, dtype=dtype)
    x_guarded[:count], w_guarded[:count] = x, w
    lanes = np.zeros(8, np.float32)
    for k in range(count):
        exact = float(x[k]) * float(w[k]) + float(lanes[k % 8])  # 48 + a few bits: float64 holds nearly all of it
        lanes[k % 8] = np.float32(exact)
    four = lanes[:4] + lanes[4:]
    want = (four[0] + four[2]) + (four[1] + four[3])
    assert dot(x_guarded.numpy(), as_stored(w_guarded), count) == want


def every_pattern() -> torch.Tensor:
    """A spread over all fp32 bit patterns, ties to even and the edges of both 16-bit formats among them."""
    spread = np.arange(0, 2**32, 65_521, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(0x3F00, 0x4080, dtype=np.uint32) << 16) + np.array([[0x7FFF], [0x8000], [0x8001]], np.uint32)
    half_ties = np.arange(0x3F80_0000, 0x3F90_0000, 0x1000, dtype=np.uint32)
    edges = np.array(
        [
            0x7F800000,
            0xFF800000,
            0x7F800001,
            0xFFFFFFFF,
            0x7F7FFFFF,
            0x477FEFFF,
            0x477FF000,
            0x33000000,
            0x33000001,
            0x387FC000,
        ],
        np.uint32,
    )
    return torch.from_numpy(np.concatenate([spread, ties.ravel(), half_ties, edges]).view(np.float32).copy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("move", [move8, move1], ids=["vector", "scalar"])
def test_rounding_is_torchs(move, dtype):
    x = every_pattern()
    got, want = torch.zeros_like(x, dtype=dtype), x.to(dtype)
    move(x.numpy(), as_stored(got), x.numel())
    number = ~want.isnan()
    assert torch.equal(got.isnan(), ~number)
    assert torch.equal(got.view(torch.int16)[number], want.view(torch.int16)[number])
    back = torch.empty_like(x)
    move(as_stored(got), back.numpy(), x.numel())
    assert torch.equal(back[number], want.float()[number])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_partial_store_touches_nothing_else(dtype):
    for count in range(8):
        target = torch.full((24,), 7.0, dtype=dtype)
        move8(np.ones(24, np.float32), as_stored(target), 8 + count)
        assert target.tolist() == [1.0] * (8 + count) + [7.0] * (16 - count)


def test_a_dtype_without_a_meaning_is_refused():
    with pytest.raises(numba.core.errors.TypingError):
        move1(np.ones(8, np.float64), np.ones(8, np.float32), 8)


def test_lanes_are_eight():
    assert simd.LANES == 8
