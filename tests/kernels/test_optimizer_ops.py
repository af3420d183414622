"""AdamW and sums of squares: close to fp64, exact where they can be, the same bits however they are cut."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels.cpu import CpuOps
from headrace.kernels.reference import ReferenceOps

ONE, REFERENCE = CpuOps(threads=1), ReferenceOps()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KNOBS: dict[str, Any] = {"rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1, "scale": 0.37}
examples = settings(max_examples=30, deadline=None, derandomize=True)


def normal(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def state(size: int, dtype: torch.dtype) -> list[Tensor]:
    """master, grad, first, second, stored."""
    return [
        normal(size),
        normal(size, 1).to(dtype),
        normal(size, 2) * 0.1,
        normal(size, 3).square() * 0.1,
        torch.zeros(size, dtype=dtype),
    ]


@examples
@given(st.data(), st.integers(1, 3000), st.sampled_from(DTYPES), st.booleans(), st.integers(1, 10**6))
def test_a_step_of_adamw(cut, data, size, dtype, rounds, step):
    start = state(size, dtype)
    results = []
    for ops in (ONE, cut, REFERENCE):
        tensors = [x.clone() for x in start]
        weight, gradient, mean, square, stored = tensors
        ops.adamw_(weight, gradient, mean, square, stored if rounds else None, step=step, **KNOBS)
        results.append(tensors)
    got, other, slow = results
    assert all(torch.equal(a, b) for a, b in zip(got, other))
    master, grad, first, second = (x.double() for x in start[:4])
    g = grad * KNOBS["scale"]
    first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g * g
    update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    for ours, want in zip(got, (master * (1 - 0.001) - 0.01 * update, None, first, second)):
        if want is not None:
            torch.testing.assert_close(ours.double(), want, rtol=2e-6, atol=1e-7)
    for a, b in zip(got[:4], slow):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
    assert torch.equal(got[1], start[1])
    assert torch.equal(got[4], got[0].to(dtype)) if rounds else not got[4].any()
    a, b = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    part = [x[a:b].clone() for x in start]
    cut.adamw_(*part, step=step, **KNOBS)
    assert all(torch.equal(x, y[a:b]) for x, y in zip(part[:4], got))


def test_many_steps_follow_torch():
    grads = [normal(777, seed) for seed in range(20)]
    parameter = torch.nn.Parameter(normal(777, 99))
    theirs = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    master, first, second = parameter.detach().clone(), torch.zeros(777), torch.zeros(777)
    for step, grad in enumerate(grads, 1):
        parameter.grad = grad * KNOBS["scale"]
        theirs.step()
        ONE.adamw_(master, grad, first, second, None, step=step, **KNOBS)
    torch.testing.assert_close(master, parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_narrow_gradient_is_its_widened_self(dtype):
    start = state(100, dtype)
    wide = [x.clone() for x in start]
    wide[1] = start[1].float()
    for tensors in (start, wide):
        ONE.adamw_(*tensors, step=2, **KNOBS)
    assert all(torch.equal(start[i], wide[i]) for i in (0, 2, 3, 4))


def test_tensors_that_do_not_fit_are_refused():
    for at in (1, 2, 3, 4):
        tensors = state(10, torch.float32)
        tensors[at] = tensors[at][:9]
        with pytest.raises(ValueError, match=r"\(9,\)"):
            ONE.adamw_(*tensors, step=1, **KNOBS)
    square = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="not flat"):
        ONE.adamw_(square, square, square, square, None, step=1, **KNOBS)
    half = torch.zeros(10, dtype=torch.float16)
    with pytest.raises(ValueError, match="float32"):
        ONE.adamw_(half, half, half, half, None, step=1, **KNOBS)


@examples
@given(st.integers(0, 3000), st.integers(1, 700), st.sampled_from(DTYPES))
def test_sums_of_squares(cut, size, chunk, dtype):
    flat = (normal(size) * 1e3).to(dtype)
    got = ONE.sum_of_squares(flat, chunk)
    parts = [flat[i : i + chunk] for i in range(0, size, chunk)]
    assert got.dtype == torch.float64 and got.shape == (len(parts),)
    for total, part in zip(got.tolist(), parts):
        assert total == pytest.approx(math.fsum(x * x for x in part.tolist()), rel=1e-14)
        assert total == cut.sum_of_squares(part.clone(), chunk).item()
    assert torch.equal(got, cut.sum_of_squares(flat, chunk))
    torch.testing.assert_close(got, REFERENCE.sum_of_squares(flat, chunk), rtol=1e-13, atol=0.0)


def test_squares_beyond_fp32_and_what_is_not_finite():
    assert ONE.sum_of_squares(torch.tensor([3e38, 1e-30, 3e38]), 3).item() == pytest.approx(1.8e77, rel=1e-6)
    broken = torch.tensor([1.0, math.inf, math.nan, 1.0])
    assert ONE.sum_of_squares(broken, 2)[0] == math.inf and ONE.sum_of_squares(broken, 2)[1].isnan()
    with pytest.raises(ValueError, match="at least 1"):
        ONE.sum_of_squares(broken, 0)
