"""Fixtures that every room's tests share."""

import os
from pathlib import Path

import hypothesis
import pytest

import headrace  # noqa: F401  (before torch: it tells OpenMP's threads not to spin)
from two_workers import compile_kernels, in_order, once, scheduler

# A deadline is an assert on time, which a busy machine fails.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser):
    parser.addoption("--write-soak", action="store_true", help="keep what soak tests tell in docs/results/soak.json")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return scheduler(config, log)


def pytest_sessionstart(session):
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        compile_kernels(worker)


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        in_order(items)


def pytest_terminal_summary(terminalreporter, config):
    """Every soak test with its outcome, its seconds and what it has recorded."""
    if not config.getoption("--write-soak"):
        return
    from headrace.bench.measure import write_results

    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" and "soak" in report.keywords
    ]
    told = {
        report.nodeid: {"outcome": report.outcome, "seconds": round(report.duration, 1), **dict(report.user_properties)}
        for report in reports
    }
    terminalreporter.write_line(
        str(write_results("soak", {"tests": dict(sorted(told.items()))}, config.rootpath / "docs" / "results"))
    )


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real files (traces, prompts, checkpoints); tests that need it skip where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("HEADRACE_DATA", beside))
    if not folder.is_dir():
        pytest.skip("HEADRACE_DATA does not name a folder of real data: this test needs it")
    return folder


@pytest.fixture(scope="session")
def tinyworld_checkpoint(tmp_path_factory) -> Path:
    """A small model trained on tinyworld for a moment, as a Hugging Face folder."""
    from headrace.train.config import load_recipe
    from headrace.train.run import train

    recipe = Path(__file__).resolve().parents[1] / "recipes" / "demo.toml"
    sizes = {
        "model.hidden_size": 64,
        "model.intermediate_size": 172,
        "model.num_layers": 2,
        "model.head_dim": 16,
        "train.steps": 60,
        "train.batch_size": 2,
        "optimizer.warmup_steps": 5,
        "train.sample_every": 0,
    }
    changes = [f"{name}={value}" for name, value in sizes.items()]
    return once(tmp_path_factory, "tinyworld", lambda out: train(load_recipe(recipe, changes), out)) / "hf"


@pytest.fixture(scope="session")
def other_checkpoint(tinyworld_checkpoint, tmp_path_factory) -> Path:
    """The same model with other weights, and the same tokenizer."""
    import torch

    from headrace.kernels.load import load_ops
    from headrace.model.huggingface import load_model, save_model

    model = load_model(tinyworld_checkpoint, load_ops("reference"))
    draw = torch.Generator().manual_seed(3)
    for _, piece in model.tensors():
        piece.tensor.add_(torch.empty(piece.tensor.shape).normal_(0, 0.03, generator=draw))
    folder = tmp_path_factory.mktemp("other") / "hf"
    save_model(model, folder)
    for file in tinyworld_checkpoint.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
