"""The wheel, in an environment of its own and far from a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from headrace import __version__

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "train.steps": 3,
    "train.batch_size": 1,
    "train.seq_length": 64,
    "optimizer.warmup_steps": 1,
    "model.num_layers": 1,
}


def call(*command, cwd):
    """Standard output of a command that does not see this checkout."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def flags(**more):
    """--set for a model that trains in a moment."""
    return [word for key, value in {**SMALL, **more}.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("src", "recipes"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "wheel", "-q", *offline, source, "-w", out, cwd=out)
    [built] = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel and the packages that these tests run with."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", *offline, wheel, cwd=folder)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "headrace"


def test_it_holds_the_recipes_and_the_playground(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"headrace/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()} <= names
    assert {
        f"headrace/serve/playground/{p.name}" for p in (ROOT / "src/headrace/serve/playground").glob("*.*")
    } <= names
    assert {"headrace/py.typed", "headrace/__main__.py"} <= names
    assert not any(name.startswith(("tests/", "bench/", "recipes/")) for name in names)


@pytest.mark.parametrize("recipe", ["demo", "recipes/demo.toml"])
def test_it_trains_its_own_recipe_and_generates(installed, tmp_path, recipe):
    assert call(installed, "--version", cwd=tmp_path) == f"headrace {__version__}\n"
    reference = flags(**{"train.kernels": "reference"})  # the compiled kernels of another folder are compiled anew
    out = call(installed, "train", recipe, "--out", "run", *reference, cwd=tmp_path)
    assert "headrace generate run/hf" in out
    prompt = ("--prompt", "Once", "--max-tokens", 2, "--kernels", "reference")
    assert call(installed, "generate", "run/hf", *prompt, cwd=tmp_path).startswith("Once")


def test_it_plans_the_large_recipe(installed, tmp_path):
    assert "fits" in call(installed, "plan", "7b", "--memory", "80GiB", cwd=tmp_path)


@pytest.mark.soak
def test_its_demo_runs(installed, tmp_path):
    out = call(installed, "demo", "--once", *flags(**{"train.steps": 40}), cwd=tmp_path)
    assert "32/32 replies bit-identical to solo" in out and "↳" in out


@pytest.mark.soak
def test_a_whole_install_runs(wheel, tmp_path):
    """With the package index: the extras bring what `headrace demo` needs."""
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    bin = tmp_path / "env" / "bin"
    if index := os.environ.get("TORCH_INDEX_URL"):
        call(bin / "pip", "install", "-q", "--index-url", index, "torch", cwd=tmp_path)
    call(bin / "pip", "install", "-q", f"{wheel}[serve,train]", cwd=tmp_path)
    out = call(bin / "headrace", "demo", "--once", *flags(**{"train.steps": 40}), cwd=tmp_path)
    assert "32/32 replies bit-identical to solo" in out and "↳" in out
