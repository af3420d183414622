"""Every test of the engine runs under the guard that only the request pool changes a `Request`."""

import pytest

from engine.writers import only_the_pool_writes


@pytest.fixture(autouse=True)
def _one_writer(monkeypatch):
    only_the_pool_writes(monkeypatch)
