"""Products in processes of their own: other registers, another threading layer, freed memory, the end of a page.

Each process compiles or loads the kernels, and the narrow one has a cache of its own: it runs once, for all tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.kernels.cpu import launch

TESTS = Path(__file__).resolve().parents[1]
NARROW = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2",
}


def said(call: str, **environment: str) -> list[str]:
    """What a process of its own prints, line by line; `call` is of `product_process`."""
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", f"from kernels import product_process; product_process.{call}"],
        env=os.environ | environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def facts(lines: list[str]) -> dict[str, str]:
    return dict(line.rsplit("/", 1) for line in lines)


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return facts(said("products(2)"))


def assert_same_products(some: dict[str, str], other: dict[str, str]) -> None:
    told = [{name: digest for name, digest in each.items() if len(digest) == 64} for each in (some, other)]
    assert len(told[0]) > 60
    assert told[0] == told[1]


def test_a_row_has_the_same_bits_in_every_storage(here):
    """The program is worth something: where it multiplies the same numbers, it says the same."""
    for name, digest in here.items():
        if name.startswith("terms/"):
            assert digest == here[name.replace("terms", "panels")] == here[name.replace("terms", "rows")]


@pytest.mark.skipif(not launch.WIDE, reason="the CPU has no AVX-512: the other tests take the narrow tiles")
def test_the_width_of_a_register_changes_no_bits(here):
    narrow = facts(said("products(1)", **NARROW))
    assert (here["width"], narrow["width"]) == ("wide", "narrow")
    assert_same_products(narrow, here)


def test_the_threading_layer_changes_no_bits(here):
    other = facts(said("products(2)", NUMBA_THREADING_LAYER="workqueue"))
    assert other["layer"] == "workqueue"
    assert_same_products(other, here)


def test_no_workspace_is_used_once_it_is_freed(here):
    """glibc fills what is freed with this byte."""
    assert_same_products(facts(said("products(2)", MALLOC_PERTURB_="165")), here)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by Linux's calls")
def test_nothing_is_read_past_an_operand():
    """A process that touches the page behind an operand dies."""
    assert said("edges()") == ["alive"]
