"""Three models: one trained on tinyworld for a moment, one random with GQA and qk-norm, one in bf16."""

from dataclasses import replace
from pathlib import Path

import pytest

from headrace.bench.models import SHAPES, random_checkpoint
from invariance.cells import Cell, question
from invariance.driving import Trace
from invariance.harness import Worker, run_alone

GQA = replace(
    SHAPES["tiny"],
    architecture="Qwen3ForCausalLM",
    hidden_size=72,
    num_heads=8,
    num_kv_heads=2,
    head_dim=12,
    intermediate_size=172,
    qk_norm=True,
    vocab_size=300,
)
BF16 = replace(SHAPES["tiny"], dtype="bfloat16", vocab_size=401, intermediate_size=100, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tinyworld_checkpoint) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        "tinyworld": tinyworld_checkpoint,
        "gqa-qknorm": random_checkpoint(GQA, base / "gqa"),
        "bf16": random_checkpoint(BF16, base / "bf16"),
    }


@pytest.fixture(scope="session")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def alone(folders):
    """alone(cell) → what every prompt gives by itself, computed once for all cells with the same question."""
    known: dict[Cell, dict[int, Trace]] = {}

    def compute(cell: Cell) -> dict[int, Trace]:
        asked = question(cell)
        if asked not in known:
            known[asked] = run_alone(asked, folders)
        return known[asked]

    return compute
