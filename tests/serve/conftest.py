"""Servers that several modules share."""

import pytest

from serve.http_kit import served


@pytest.fixture(scope="session")
def server(tinyworld_checkpoint):
    """One server, shared by tests that do not change its state."""
    with served(tinyworld_checkpoint, "--served-model-name", "tiny", "second-name") as running:
        yield running


@pytest.fixture(scope="session")
def llm(tinyworld_checkpoint):
    """The same model in this process, with other engine options: its bits are the same."""
    from headrace import LLM

    return LLM(tinyworld_checkpoint, threads=2, num_kv_blocks=200, block_size=8)
