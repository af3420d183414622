"""One trained model, one server of it, and the environment of the clients."""

import os
from pathlib import Path

import pytest

from clients.client_kit import Clients
from headrace.train.config import load_recipe
from headrace.train.trainer import Trainer
from serve.http_kit import served

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo.toml"
SIZES = {
    "model.hidden_size": 64,
    "model.intermediate_size": 172,
    "model.num_layers": 2,
    "model.head_dim": 16,
    "train.steps": 60,
    "train.batch_size": 2,
    "optimizer.warmup_steps": 5,
    "train.sample_every": 0,
}


@pytest.fixture(scope="session")
def clients(tmp_path_factory) -> Clients:
    """The clients' environment; without one there is nothing to test."""
    folder = os.environ.get("HEADRACE_CLIENTS")
    if not folder:
        pytest.skip("HEADRACE_CLIENTS names no environment of clients: make test-clients makes one")
    return Clients(Path(folder), tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="session")
def trainer(clients) -> Trainer:
    """A trainer after its last step: what it says of a text is what the server must say."""
    recipe = load_recipe(RECIPE, [f"{name}={value}" for name, value in SIZES.items()])
    made = Trainer(recipe)
    for _ in range(recipe.train.steps):
        made.step()
    return made


@pytest.fixture(scope="session")
def checkpoint(trainer, tmp_path_factory) -> Path:
    """The folder that the trainer saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    trainer.save(folder)
    return folder


@pytest.fixture(scope="session")
def server(checkpoint):
    """One server for every client."""
    with served(checkpoint, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture(scope="session")
def llm(checkpoint):
    """The same model in this process, set up otherwise."""
    from headrace import LLM

    return LLM(checkpoint, threads=1, num_kv_blocks=200, block_size=8)
