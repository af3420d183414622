"""Three models: one trained on tinyworld for a moment, one random with GQA and qk-norm, one in bf16."""

from dataclasses import replace
from pathlib import Path

import pytest

from headrace.bench.models import SHAPES, random_checkpoint
from invariance.harness import Cell, Trace, Worker, engine_for, loaded, prompts, request

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
    """Every prompt by itself in a fresh engine, computed once for each model and way of sampling."""
    from invariance.harness import Recorder, drive

    known: dict[tuple[str, str], dict[int, Trace]] = {}

    def compute(model: str, sampling: str) -> dict[int, Trace]:
        if (model, sampling) not in known:
            cell = Cell(model, sampling)
            texts = prompts(loaded(folders[model], 2)[0].config.vocab_size)
            engine = engine_for(cell, folders[model], max(map(len, texts)))
            recorder = Recorder(engine)
            for i, text in enumerate(texts):
                item = request(i + 1, text, sampling)
                tokens = drive(engine, iter([[item]]))
                recorder.traces[i + 1].tokens = tokens[i + 1]
            known[model, sampling] = {i: recorder.traces[i + 1] for i in range(len(texts))}
        return known[model, sampling]

    return compute
