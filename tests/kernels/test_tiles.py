"""The machine code of tiles: packed fused multiply-adds, and a loop that works in registers."""

import re

import numba
import pytest

from headrace.kernels.cpu import launch
from headrace.kernels.cpu.partial import PITCH, ROWS
from headrace.kernels.cpu.product import HEIGHT
from headrace.kernels.cpu.tiles import LANES, RESUME, score_tile, tile, turned_tile

FP32, BF16 = numba.types.CPointer(numba.types.float32), numba.types.CPointer(numba.types.uint16)
I = numba.types.int64
REGISTER = "%zmm" if launch.WIDE else "%ymm"
WIDE_PANELS, NARROW_PANELS = ((2, 4), (4, 4), (8, 2), (8, 1), (16, 1)), ((2, 2), (4, 1), (6, 1))
WIDE_VALUES, NARROW_VALUES = ((2, 4), (3, 4), (4, 4), (4, 1), (8, 1), (16, 1)), ((4, 1), (6, 1))
PANELS = ((1, 4), (1, 1), *(WIDE_PANELS if launch.WIDE else NARROW_PANELS))
VALUES = ((1, 4), (1, 1), *(WIDE_VALUES if launch.WIDE else NARROW_VALUES))
SCORES = (1, 2, 3, 4, *((8, 16) if launch.WIDE else (6,)))
TURNED = (1, 4, 8) if launch.WIDE else (1, 4)
DTYPES = {"fp32": FP32, "bf16": BF16}

pytestmark = pytest.mark.skipif("+fma" not in launch.cpu_features(), reason="reads x86 assembly with FMA")


def panel_tile(rows, vectors):
    step = 1 if rows == 1 else HEIGHT

    @numba.njit(nogil=True, error_model="numpy")
    def call(x, w, i, sums):
        tile(rows, vectors, x, i, 1, step, i, w, i, i, 16, i, sums, i, i, i, i, w, i, i)

    return call


def weight_tile(rows):
    step = 1 if rows == 1 else HEIGHT

    @numba.njit(nogil=True, error_model="numpy")
    def call(x, w, i, sums):
        turned_tile(rows, x, i, 1, step, i, w, i, i, i, i, sums, i, i, i, i, i)

    return call


def scores_of(rows):
    @numba.njit(nogil=True, error_model="numpy")
    def call(x, w, i, sums, far):
        score_tile(rows, x, i, ROWS, w, i, i, sums, i, i, far, i)

    return call


def values_of(rows, vectors):
    @numba.njit(nogil=True, error_model="numpy")
    def call(x, w, i, sums):
        tile(rows, vectors, x, i, PITCH, 1, rows, w, i, LANES, i, i, sums, i, i, RESUME, 0, w, i, i)

    return call


def assembly(function, *arguments: numba.types.Type) -> str:
    function.compile(arguments)
    return function.inspect_asm(function.signatures[0])


def body(text: str, name: str) -> list[str]:
    """The instructions and labels of the function whose name starts so."""
    found = re.search(rf"^{name}\w*:\n(.*?)\.cfi_endproc", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"there is no {name}"
    lines = (line.split("#")[0].strip() for line in found[1].splitlines())
    return [line for line in lines if line and (not line.startswith(".") or line.endswith(":"))]


def fused(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("vfmadd", "vfnmadd", "vfmsub", "fma"))]


def innermost_loops(lines: list[str]) -> list[list[str]]:
    """What lies between a label and a jump back to it, with no such loop inside."""
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for at, line in enumerate(lines):
        jump = re.match(r"j\w+\s+(\S+)$", line)
        if jump and labels.get(jump[1], at) < at:
            loops.append((labels[jump[1]], at))
    return [lines[a : b + 1] for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]


def hot_loop(lines: list[str]) -> list[str]:
    """The innermost loop with the most multiply-adds."""
    return max(innermost_loops(lines), key=lambda loop: len(fused(loop)))


def on_the_stack(lines: list[str], whole: list[str]) -> list[str]:
    """Those of the lines that load or store in the function's frame; %rbp is one register of many without a frame."""
    framed = any(re.match(r"movq\s+%rsp, %rbp$", line) for line in whole)
    return [line for line in lines if re.search(r"\([^)]*%rsp" + (r"|\([^)]*%rbp" if framed else ""), line)]


def assert_packed(lines: list[str], least: int) -> None:
    products = fused(lines)
    assert len(products) >= least
    assert all(line.split()[0].endswith("ps") and REGISTER in line for line in products)
    assert not [line for line in lines if line.startswith(("vmulps", "vmulss", "vmulpd", "call"))]


def assert_sums_stay(lines: list[str]) -> None:
    stored = [line for line in on_the_stack(hot_loop(lines), lines) if re.search(r"%[xyz]mm\d+, \S*\(", line)]
    assert stored == []


def assert_no_stack(lines: list[str]) -> None:
    assert on_the_stack(hot_loop(lines), lines) == []


def panels(shape: tuple[int, int], dtype: str) -> list[str]:
    text = assembly(panel_tile(*shape), FP32, DTYPES[dtype], I, FP32)
    return body(text, f"headrace_tile_{shape[0]}x{shape[1]}_")


def turned(rows: int, dtype: str) -> list[str]:
    return body(assembly(weight_tile(rows), FP32, DTYPES[dtype], I, FP32), f"headrace_turned_tile_{rows}_")


of_panels = pytest.mark.parametrize(
    "shape,dtype", [pytest.param(s, d, id=f"{s[0]}x{s[1]}-{d}") for s in PANELS for d in DTYPES]
)
of_scores = pytest.mark.parametrize("rows,dtype", [(rows, dtype) for rows in SCORES for dtype in DTYPES])
of_values = pytest.mark.parametrize(
    "shape,dtype", [pytest.param(s, d, id=f"{s[0]}x{s[1]}-{d}") for s in VALUES for d in DTYPES]
)
of_rows = pytest.mark.parametrize("rows,dtype", [(rows, dtype) for rows in TURNED for dtype in DTYPES])


@of_panels
def test_tiles_are_packed_fused_multiply_adds(shape, dtype):
    assert_packed(panels(shape, dtype), shape[0] * shape[1] * (1 if launch.WIDE else 2))


@of_panels
def test_the_sums_of_a_tile_stay_in_registers(shape, dtype):
    assert_sums_stay(panels(shape, dtype))


@of_panels
def test_the_loop_of_a_tile_leaves_the_stack_alone(shape, dtype):
    assert_no_stack(panels(shape, dtype))


@of_rows
def test_turned_tiles_are_packed_fused_multiply_adds(rows, dtype):
    assert_packed(turned(rows, dtype), rows * (16 if launch.WIDE else 8))


@of_rows
def test_the_sums_of_a_turned_tile_stay_in_registers(rows, dtype):
    """The addresses of sixteen lanes do not: there are not so many registers for them."""
    assert_sums_stay(turned(rows, dtype))


def scores(rows: int, dtype: str) -> list[str]:
    text = assembly(scores_of(rows), FP32, FP32, I, FP32, DTYPES[dtype])
    return body(text, f"headrace_score_tile_{rows}_")


@of_scores
def test_scores_are_packed_fused_multiply_adds(rows, dtype):
    assert_packed(scores(rows, dtype), 8 * rows * (1 if launch.WIDE else 2))


@of_scores
def test_the_sums_of_scores_stay_in_registers(rows, dtype):
    assert_sums_stay(scores(rows, dtype))


def values(shape: tuple[int, int], dtype: str) -> list[str]:
    text = assembly(values_of(*shape), FP32, DTYPES[dtype], I, FP32)
    return body(text, f"headrace_tile_{shape[0]}x{shape[1]}_")


@of_values
def test_weighted_values_are_packed_fused_multiply_adds(shape, dtype):
    assert_packed(values(shape, dtype), shape[0] * shape[1] * (1 if launch.WIDE else 2))


@of_values
def test_the_loop_of_weighted_values_leaves_the_stack_alone(shape, dtype):
    assert_no_stack(values(shape, dtype))
