"""The products behind a linear's gradients: right, in one order whatever the shape, the threads and the registers."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels.cpu import CpuOps, launch
from headrace.kernels.cpu.linear_backward import DEPTH
from headrace.kernels.reference import ReferenceOps
from headrace.kernels.shards import tree

ONE, TWO, REFERENCE = CpuOps(threads=1), CpuOps(threads=2), ReferenceOps()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
examples = settings(max_examples=30, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chained(g_TN: Tensor, b_NK: Tensor) -> Tensor:
    """Chains of FMAs in chunks of DEPTH, the chunks added in order: fp64 makes each FMA of fp32 but for rare ties."""
    total: Tensor | None = None
    for start in range(0, b_NK.shape[0], DEPTH):
        chunk = torch.zeros(g_TN.shape[0], b_NK.shape[1])
        for s in range(start, min(start + DEPTH, len(b_NK))):
            chunk = (g_TN[:, s, None].double() * b_NK[s].double() + chunk.double()).float()
        total = chunk if total is None else total + chunk
    assert total is not None
    return total


def assert_close(got: Tensor, want: Tensor, terms: int) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * max(1, terms) ** 0.5)


@examples
@given(st.data(), st.integers(1, 150), st.integers(0, 700), st.integers(1, 300), st.sampled_from(DTYPES))
def test_by_the_inputs(data, rows, outputs, inputs, dtype):
    shards = data.draw(st.sampled_from((1, 2, 4)))
    cuts = data.draw(st.lists(st.integers(0, outputs), min_size=shards - 1, max_size=shards - 1))
    spans = tuple((i, a, a, b - a) for i, (a, b) in enumerate(pairwise((0, *sorted(cuts), outputs))))
    g, weight = normal(rows, outputs), normal(outputs, inputs, seed=1).to(dtype)
    got = ONE.linear_backward_input(g, weight, spans)
    assert_close(got, g.double() @ weight.double(), outputs)
    assert_close(REFERENCE.linear_backward_input(g, weight, spans), g.double() @ weight.double(), outputs)
    assert torch.equal(got, TWO.linear_backward_input(g, weight, spans))
    row = data.draw(st.integers(0, rows - 1))
    assert torch.equal(got[row], ONE.linear_backward_input(g[row : row + 1], weight, spans)[0])
    k = data.draw(st.integers(1, inputs))
    assert torch.equal(got[:, :k], TWO.linear_backward_input(g, weight[:, :k].contiguous(), spans))
    alone = [
        ONE.linear_backward_input(g[:, a : a + n].contiguous(), weight[a : a + n].contiguous(), ((0, 0, 0, n),))
        for _, a, _, n in spans
    ]
    assert torch.equal(got, tree(alone))


@examples
@given(st.data(), st.integers(0, 700), st.integers(1, 300), st.integers(1, 150))
def test_by_the_weight(data, rows, outputs, inputs):
    g, x = normal(rows, outputs), normal(rows, inputs, seed=1)
    got = ONE.linear_backward_weight(g, x)
    assert_close(got, g.double().T @ x.double(), rows)
    assert_close(REFERENCE.linear_backward_weight(g, x), g.double().T @ x.double(), rows)
    assert torch.equal(got, TWO.linear_backward_weight(g, x))
    a, b = sorted(data.draw(st.tuples(st.integers(0, outputs), st.integers(0, outputs))))
    assert torch.equal(got[a:b], TWO.linear_backward_weight(g[:, a:b].contiguous(), x))
    into = torch.zeros(outputs, inputs)
    for start in range(0, rows, 2 * DEPTH):
        ONE.linear_backward_weight(g[start : start + 2 * DEPTH], x[start : start + 2 * DEPTH], into)
    assert torch.equal(into, got)


def test_the_order_of_terms():
    g, weight = normal(3, 2 * DEPTH + 5), normal(2 * DEPTH + 5, 7, seed=1)
    wanted = chained(g, weight)
    got = ONE.linear_backward_input(g, weight, ((0, 0, 0, len(weight)),))
    assert (got != wanted).sum() <= 1
    assert torch.equal(ONE.linear_backward_weight(g.T.contiguous(), weight), got)


def test_several_spans_of_a_shard_and_rows_that_shards_share():
    g, weight = normal(9, 60), normal(40, 33, seed=1)
    spans = ((0, 0, 0, 15), (0, 30, 30, 10), (1, 15, 15, 15), (1, 50, 30, 10))
    wanted = tree(
        [
            sum(
                (g[:, c : c + n].double() @ weight[r : r + n].double() for s, c, r, n in spans if s == shard),
                torch.zeros((), dtype=torch.float64),
            )
            for shard in range(2)
        ]
    )
    assert_close(ONE.linear_backward_input(g, weight, spans), wanted, 50)
    assert_close(REFERENCE.linear_backward_input(g, weight, spans), wanted, 50)


@pytest.mark.parametrize(
    "spans",
    [
        ((0, 0, 0, 9),),
        ((0, 1, 0, 8),),
        ((1, 0, 0, 8),),
        ((1, 0, 0, 4), (0, 4, 4, 4)),
        ((0, 0, 0, 2), (1, 2, 2, 2), (2, 4, 4, 4)),
        ((0, -1, 0, 2),),
    ],
)
def test_spans_that_do_not_fit_are_refused(spans):
    with pytest.raises(ValueError, match="spans="):
        ONE.linear_backward_input(normal(2, 8), normal(8, 4), spans)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not go"):
        ONE.linear_backward_weight(normal(3, 8), normal(4, 5))
    with pytest.raises(ValueError, match="do not go"):
        ONE.linear_backward_weight(normal(3, 8), normal(3, 5), torch.zeros(5, 8))


PROGRAM = """
import torch
from headrace.kernels.cpu import CpuOps, launch
torch.manual_seed(0)
ops, g, x, w = CpuOps(threads=2), torch.randn(70, 300), torch.randn(70, 45), torch.randn(300, 45).bfloat16()
spans = ((0, 0, 0, 100), (1, 100, 100, 200))
found = [ops.linear_backward_input(g, w, spans), ops.linear_backward_weight(g, x), ops.linear(x[:3], w)]
h, starts = torch.randn(5, 70, 2, 40), torch.tensor([0, 9, 70], dtype=torch.int32)
found += ops.attention_backward(*h, torch.full((70, 2), 3.0), starts, 0.3)
print(launch.WIDE, *(sum(y.flatten().view(torch.int32).tolist()) for y in found))
"""


def run(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, text=True, capture_output=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(not launch.WIDE, reason="the CPU has no AVX-512: the other tests take the narrow tiles")
def test_the_width_of_a_register_changes_no_bits():
    narrow = run(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c")
    assert narrow == ["False", *run()[1:]]


def test_no_workspace_is_used_once_it_is_freed():
    """glibc fills what is freed with this byte."""
    assert run(MALLOC_PERTURB_="165") == run()
