"""The matrix product: close to float64, and each output has the same bits whatever is computed with it."""

import itertools
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.kernels.cpu import CpuOps, launch, linear, tiles
from headrace.kernels.shards import shard_bounds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEPTHS = (1, 7, 8, 9, 31, 33, 100, 172)


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    return CpuOps()


def operands(rows: int, outputs: int, depth: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w, bias = (torch.randn(shape, generator=generator) for shape in ((rows, depth), (outputs, depth), (outputs,)))
    return x, w.to(dtype), bias


def definition(x: Tensor, w: Tensor, bias: Tensor | None, bounds: tuple[int, ...]) -> Tensor:
    """The sum as it is defined, one multiplication at a time, rounded where a fused product rounds."""
    x64, w64 = x.double().numpy(), w.double().numpy()
    sums = []
    for start, stop in itertools.pairwise(bounds):
        lanes = np.zeros((8, x.shape[0], w.shape[0]), np.float32)
        for k in range(start, stop):
            lane = lanes[(k - start) % 8]
            lane[:] = (x64[:, None, k] * w64[None, :, k] + lane).astype(np.float32)
        four = lanes[:4] + lanes[4:]
        sums.append((four[0] + four[2]) + (four[1] + four[3]))
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2])]
    return torch.from_numpy(sums[0]) + (0 if bias is None else bias)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_outputs_do_not_see_each_other(ops, dtype, depth):
    """M 1–9 × N 1–40, with and without shards: `==` with the row alone, and with the output alone."""
    x, w, bias = operands(9, 40, depth, dtype)
    for bounds in (None, shard_bounds(depth, 4)):
        alone = torch.cat([ops.linear(x[i : i + 1].contiguous(), w, bias, bounds) for i in range(9)])
        single = torch.cat(
            [ops.linear(x, w[n : n + 1].contiguous(), bias[n : n + 1].contiguous(), bounds) for n in range(40)], dim=1
        )
        assert torch.equal(alone, single)
        for rows, outputs in itertools.product(range(1, 10), range(1, 41)):
            y = ops.linear(x[:rows].contiguous(), w[:outputs], bias[:outputs], bounds)
            assert torch.equal(y, alone[:rows, :outputs]), (rows, outputs, bounds)


@pytest.mark.parametrize("rows,outputs,depth", [(40, 33, 1100), (300, 9, 1033), (17, 70, 520), (2, 40, 2000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_chunks_and_groups_change_no_bits(ops, dtype, rows, outputs, depth):
    x, w, bias = operands(rows, outputs, depth, dtype)
    for bounds in (None, shard_bounds(depth, 2)):
        y = ops.linear(x, w, bias, bounds)
        some = [0, 1, rows // 2, rows - 1]
        alone = [ops.linear(x[i : i + 1].contiguous(), w, bias, bounds) for i in some]
        assert torch.equal(y[some], torch.cat(alone))
        assert (y - (x.double() @ w.double().T + bias)).abs().max() < 3e-4


@pytest.mark.parametrize("bounds", [(0, 44), (0, 32, 44), (0, 32, 32, 40, 44), (0, 0, 8, 9, 20, 20, 43, 44, 44)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_sum_is_what_it_is_defined_to_be(ops, rows, dtype, bounds):
    x, w, bias = operands(rows, 11, 44, dtype)
    assert torch.equal(ops.linear(x, w, bias, bounds), definition(x, w, bias, bounds))
    assert torch.equal(ops.linear(x, w, None, bounds), definition(x, w, None, bounds))


def test_shards_make_another_sum(ops):
    """The mutant of the tests above: were `bounds` ignored, they would still agree with each other."""
    x, w, _ = operands(4, 16, 172, torch.float32)
    assert not torch.equal(ops.linear(x, w), ops.linear(x, w, None, shard_bounds(172, 4)))


def test_a_shard_is_its_own_product(ops):
    """What tensor parallelism relies on: a rank's shard alone, and the tree above it, give the whole."""
    x, w, _ = operands(5, 24, 172, torch.bfloat16)
    bounds = shard_bounds(172, 4)
    parts = [ops.linear(x[:, a:b].contiguous(), w[:, a:b].contiguous()) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(ops.linear(x, w, None, bounds), (parts[0] + parts[1]) + (parts[2] + parts[3]))


@pytest.mark.parametrize("rows", [1, 4, 5, 33])
def test_threads_change_no_bits(rows):
    x, w, bias = operands(rows, 1000, 300, torch.bfloat16)
    one, two = (CpuOps(threads=n).linear(x, w, bias) for n in (1, 2))
    assert torch.equal(one, two)


def test_nothing_is_read_past_a_row(ops):
    """A row that ends in the middle of eight inputs must not touch the next one."""
    x, w, _ = operands(9, 12, 33, torch.float32)
    x[5], w[7] = torch.nan, torch.inf
    y = ops.linear(x, w)
    assert y[[0, 1, 2, 3, 4, 6, 7, 8]][:, [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]].isfinite().all()


def test_no_rows(ops):
    assert ops.linear(torch.empty(0, 16), torch.ones(8, 16)).shape == (0, 8)


@pytest.mark.parametrize("bounds", [(0, 8), (1, 16), (0, 12, 8, 16, 16), (0, 4, 8, 16)])
def test_impossible_shards_are_refused(ops, bounds):
    with pytest.raises(ValueError, match="bounds"):
        ops.linear(torch.ones(1, 16), torch.ones(8, 16), None, bounds)


def test_what_a_kernel_cannot_read_is_refused(ops):
    with pytest.raises(ValueError, match="inputs"):
        ops.linear(torch.ones(1, 15), torch.ones(8, 16))
    with pytest.raises(ValueError, match="contiguous"):
        ops.linear(torch.ones(16, 3).T, torch.ones(8, 16))
    with pytest.raises(ValueError, match="contiguous"):
        ops.linear(torch.ones(3, 16), torch.ones(16, 8).T)
    with pytest.raises(ValueError, match="float64"):
        ops.linear(torch.ones(3, 16), torch.ones(8, 16, dtype=torch.float64))


def assembly(tile, *arguments: numba.types.Type) -> list[str]:
    fresh = numba.njit(nogil=True, error_model="numpy")(tile.py_func)
    fresh.compile(arguments)
    return fresh.inspect_asm(fresh.signatures[0]).splitlines()


FP32, BF16 = numba.types.CPointer(numba.types.float32), numba.types.CPointer(numba.types.uint16)
I, YES = numba.types.int64, numba.types.boolean


@pytest.mark.skipif("+fma" not in launch.cpu_features(), reason="reads x86 assembly with FMA")
@pytest.mark.parametrize(
    "tile,arguments,register",
    [
        (tiles.tile1x8, (FP32, I, FP32, *[I] * 10, FP32, I), "%ymm"),
        (tiles.tile1x8, (FP32, I, BF16, *[I] * 10, FP32, I), "%ymm"),
        (tiles.tile4x2, (FP32, *[I] * 4, FP32, I, I, I, YES, YES, FP32, I, FP32, I, I), "%ymm"),
        (tiles.tile4x3, (FP32, *[I] * 4, FP32, I, I, I, I, YES, YES, FP32, I, FP32, I, I), "%ymm"),
        (tiles.tile8x4, (FP32, I, FP32, *[I] * 5, YES, YES, FP32, I, FP32, I, I, BF16, I, I, I), "%zmm"),
    ],
    ids=["1x8", "1x8-bf16", "4x2", "4x3", "8x4"],
)
def test_tiles_are_packed_fused_multiply_adds(tile, arguments, register):
    if register == "%zmm" and not linear.WIDE:
        pytest.skip("no AVX-512 here")
    lines = assembly(tile, *arguments)
    fused = [line for line in lines if "vfmadd" in line]
    assert len(fused) >= 16 and all("ps" in line.split()[0] and register in line for line in fused)
    assert not any("NRT_" in line for line in lines), "a reference count inside a tile spills its accumulators"


SCRIPT = """
import hashlib, numba, torch
from headrace.kernels.cpu import CpuOps, linear
torch.manual_seed(0)
x, w = torch.randn(35, 1100), torch.randn(600, 1100).bfloat16()
ops = CpuOps(threads=2)
y = torch.cat([ops.linear(x, w, None, (0, 544, 1100)), ops.linear(x[:4].contiguous(), w), ops.linear(x[:1], w)])
print(numba.threading_layer(), "wide" if linear.WIDE else "narrow", hashlib.sha256(y.numpy().tobytes()).hexdigest())
"""


def said(**environment: str) -> tuple[str, str, str]:
    """(threading layer, register width, hash of some products) of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    layer, width, digest = done.stdout.split()
    return layer, width, digest


@pytest.fixture(scope="module")
def here() -> str:
    return said()[2]


def test_the_threading_layer_changes_no_bits(here):
    layer, _, digest = said(NUMBA_THREADING_LAYER="workqueue")
    assert (layer, digest) == ("workqueue", here)


@pytest.mark.skipif(not linear.WIDE, reason="the CPU has no AVX-512: the other tests take the narrow tiles")
def test_the_width_of_a_register_changes_no_bits(here):
    features = "+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
    _, width, digest = said(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=features)
    assert (width, digest) == ("narrow", here)
