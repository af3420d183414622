"""`CpuOps` as a whole: the protocol, its views of weights, the cache of compiled kernels, the fingerprint."""

import contextlib
import gc
import inspect
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest
import torch

from headrace.errors import ConfigError
from headrace.kernels.cpu import CpuOps, launch
from headrace.kernels.load import load_ops
from headrace.kernels.training import TrainingOps


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    return CpuOps()


def test_it_is_the_whole_protocol():
    for name, wanted in inspect.getmembers(TrainingOps, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(CpuOps, name)).parameters
            assert list(ours) == list(inspect.signature(wanted).parameters), name
    assert isinstance(load_ops("cpu", threads=1), CpuOps)


def test_threads_are_checked():
    everything = CpuOps().threads
    assert CpuOps(threads=0).threads == everything == CpuOps(threads=10_000).threads
    assert CpuOps(threads=1).threads == 1
    with pytest.raises(ConfigError, match="threads=-1"):
        CpuOps(threads=-1)


def test_warm_up_compiles_everything_and_tells(ops):
    calls = []
    ops.warm_up(torch.bfloat16, torch.float32, lambda done, total, name: calls.append((done, total, name)))
    total = calls[0][1]
    assert [done for done, _, _ in calls] == list(range(total + 1))
    assert calls[-1] == (total, total, "") and all(name for _, _, name in calls[:-1])


def test_warm_up_for_training_compiles_more(ops):
    served, trained = [], []
    ops.warm_up(progress=lambda done, total, name: served.append(name))
    ops.warm_up(progress=lambda done, total, name: trained.append(name), training=True)
    assert trained[: len(served) - 1] == served[:-1] and "adamw" in trained


def test_what_runs_as_one_call_compiles_no_single_block(ops):
    single, called = [], []
    ops.warm_up(progress=lambda done, total, name: single.append(name))
    ops.warm_up(progress=lambda done, total, name: called.append(name), one_call=True)
    assert "attention" in single and "layers" not in single
    assert "attention" not in called and called[0] == "layers"


def test_a_view_follows_its_weight(ops):
    x, weight = torch.ones(1, 8), torch.nn.Parameter(torch.ones(4, 8))
    assert ops.linear(x, weight).tolist() == [[8.0] * 4]
    with torch.no_grad():
        weight.mul_(2)
    assert ops.linear(x, weight).tolist() == [[16.0] * 4]
    weight.data = torch.full((4, 8), 3.0)
    assert ops.linear(x, weight).tolist() == [[24.0] * 4]


def test_a_dead_weight_leaves_nothing_behind():
    ops = CpuOps(threads=1)
    for _ in range(3):
        ops.linear(torch.ones(1, 8), torch.ones(4, 8), torch.ones(4))
    gc.collect()
    assert not ops._views


def test_the_fingerprint_names_what_bits_depend_on(ops):
    said = ops.fingerprint()
    assert said == CpuOps(threads=1).fingerprint()
    assert said.startswith("cpu/") and launch.source_key() in said and numba.__version__ in said


def test_editing_a_source_does_not_change_a_running_process(ops, monkeypatch):
    before = ops.fingerprint()
    monkeypatch.setattr(launch, "source_key", lambda: "edited")
    assert ops.fingerprint() == before == CpuOps(threads=1).fingerprint()


# ---- the cache of compiled kernels -----------------------------------------------------------------------------


def test_any_change_of_source_is_another_build(tmp_path):
    """Numba alone would keep a kernel whose callee, in another file, has changed."""
    (tmp_path / "kernel.py").write_text("def f(x): return g(x)\n")
    (tmp_path / "callee.py").write_text("def g(x): return x\n")
    before = launch.build_key(tmp_path)
    assert launch.build_key(tmp_path) == before
    (tmp_path / "callee.py").write_text("def g(x): return -x\n")
    assert launch.build_key(tmp_path) != before


@pytest.mark.parametrize(
    "owner,name",
    [(numba, "__version__"), (launch.llvmlite, "__version__"), (launch, "cpu_name"), (launch, "cpu_features")],
)
def test_another_compiler_or_cpu_is_another_build(monkeypatch, owner, name):
    before = launch.build_key()
    monkeypatch.setattr(owner, name, "other" if name == "__version__" else lambda: "other")
    assert launch.build_key() != before


def test_the_cache_is_where_it_was_asked_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "kernels"))
    assert launch.cache_folder.__wrapped__() == tmp_path / "kernels" / launch.build_key()


def aged(folder, days):
    (folder / "of a module").mkdir(parents=True)
    (folder / "of a module" / "kernel.nbc").write_bytes(b"code")
    then = time.time() - days * 86400
    os.utime(folder, (then, then))
    return folder


def test_builds_unused_for_a_month_are_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path))
    old, half_removed = aged(tmp_path / ("0" * 16), 31), aged(tmp_path / "pruned-abc", 31)
    kept = [aged(tmp_path / ("1" * 16), 29), aged(tmp_path / "holiday photos", 400)]
    (tmp_path / ("2" * 16)).symlink_to(kept[1])
    own = launch.cache_folder.__wrapped__()
    assert not old.exists() and not half_removed.exists()
    assert sorted(tmp_path.iterdir()) == sorted([own, *kept, tmp_path / ("2" * 16)])
    assert all((folder / "of a module" / "kernel.nbc").read_bytes() == b"code" for folder in kept)


def test_use_keeps_a_build(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path))
    own = aged(tmp_path / launch.build_key(), 31)
    assert launch.cache_folder.__wrapped__() == own and (own / "of a module" / "kernel.nbc").exists()
    monkeypatch.setattr(launch, "build_key", lambda: "f" * 16)
    launch.cache_folder.__wrapped__()
    assert own.exists()


def test_pruning_survives_another_that_prunes(monkeypatch, tmp_path):
    """Another process has just moved the first folder away."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path))
    folders = [aged(tmp_path / (digit * 16), 31) for digit in "01"]
    rename = os.rename
    lost: list[Path] = []

    def rename_late(source, target):
        if not lost:
            lost.append(source)
            shutil.rmtree(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_late)
    own = launch.cache_folder.__wrapped__()
    assert lost and not any(folder.exists() for folder in folders) and list(tmp_path.iterdir()) == [own]


def test_an_unwritable_cache_is_no_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "file"))
    assert launch.cache_folder.__wrapped__() is None


def test_numbas_own_cache_folder_is_left_alone(monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "elsewhere")
    compiled = launch.kernel(lambda x: x + 1)
    assert vars(numba.config)["CACHE_DIR"] == "elsewhere"
    assert str(launch.cache_folder()) in compiled._cache.cache_path
    assert compiled(1) == 2


SCRIPT = """
import torch
from headrace.kernels.cpu import CpuOps, elementwise
assert CpuOps(threads=1).rms_norm(torch.ones(2, 8), torch.ones(8), 0.0).tolist() == [[1.0] * 8] * 2
print(sum(elementwise.rms_norm.stats.cache_hits.values()), sum(elementwise.rms_norm.stats.cache_misses.values()))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    environment = os.environ | {"HEADRACE_CACHE_DIR": str(tmp_path)}
    for hits_and_misses in ("0 1\n", "1 0\n"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == hits_and_misses


TOGETHER = """
import sys
from doubled import doubled
print("here", flush=True)
sys.stdin.readline()
assert [doubled(2), doubled(2.5), doubled(2j)] == [4, 5.0, 4j]
print(sum(doubled.stats.cache_misses.values()))
"""


def test_processes_that_start_at_once_compile_each_kernel_once(tmp_path):
    """Numba alone lets them all compile, and mix up their files in the cache."""
    (tmp_path / "doubled.py").write_text(
        "from headrace.kernels.cpu.launch import kernel\n\n\n@kernel\ndef doubled(x):\n    return x + x\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"HEADRACE_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": paths}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", TOGETHER],
                    env=environment,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            for _ in range(2)
        ]
        pipes = []
        for process in started:
            assert process.stdin is not None and process.stdout is not None
            pipes.append((process.stdin, process.stdout))
        assert [out.readline() for _, out in pipes] == ["here\n"] * 2
        for into, _ in pipes:
            into.write("go\n")
            into.flush()
        assert sum([int(out.readline()) for _, out in pipes]) == 3
