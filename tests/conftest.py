"""Fixtures that every room's tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real files (traces, prompts, checkpoints); tests that need it skip where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("HEADRACE_DATA", beside))
    if not folder.is_dir():
        pytest.skip("HEADRACE_DATA does not name a folder of real data: this test needs it")
    return folder
