"""Small random checkpoints made by transformers' own classes, and logits through either attention context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.attention.context import packed_positions
from headrace.attention.dense import DenseContext
from headrace.attention.paged import PagedContext
from headrace.attention.store import KVStore
from headrace.kernels.load import load_ops
from headrace.kernels.ops import AttentionMeta

SMALL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Torch's threads cost these tiny models more than they give, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def transformers():
    """The peer that these tests compare with."""
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


@pytest.fixture(scope="session", params=["reference", "cpu"])
def ops(request, cpu_ops):
    """Each implementation of the op set."""
    return cpu_ops if request.param == "cpu" else load_ops("reference")


@pytest.fixture(scope="session")
def cpu_ops():
    """The op set in Numba, on one thread, which changes no bits."""
    return load_ops("cpu", threads=1)


@pytest.fixture(scope="session")
def reference_ops():
    """The op set in torch: what tests of loading and layout need, without compiling."""
    return load_ops("reference")


@pytest.fixture(scope="session")
def make_peer(transformers):
    """make_peer(family, seed, **changes) → a random fp32 model of transformers, its norms and biases random too."""

    def make(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
        torch.manual_seed(seed)
        config = getattr(transformers, family + "Config")(**SMALL | changes)
        model = getattr(transformers, family + "ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:
                    weight.copy_(torch.randn(weight.shape) * 0.3 + (0.0 if name.endswith("bias") else 1.0))
        return model

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, make_peer):
    """checkpoint(family, seed, **changes) → (folder, peer), a checkpoint that transformers wrote."""

    def make(
        family: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any
    ) -> tuple[Path, torch.nn.Module]:
        folder = tmp_path_factory.mktemp(family)
        make_peer(family, seed, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
        return folder, load_peer(folder)

    return make


def load_peer(folder: Path) -> torch.nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session", name="load_peer")
def load_peer_fixture(transformers):
    """load_peer(folder) → what transformers reads there, in fp32."""
    return load_peer


@pytest.fixture(scope="session")
def dense_logits():
    """dense_logits(model, sequences) → logits [T, V] of whole packed sequences."""

    def run(model, sequences: list[list[int]], **options: Any) -> torch.Tensor:
        lengths = [len(s) for s in sequences]
        ids = torch.tensor([token for s in sequences for token in s])
        ctx = DenseContext(model.ops, model.config, lengths, **options)
        with torch.no_grad():
            return model(ids, packed_positions(lengths, model.ops.device), ctx)

    return run


class PagedRun:
    """Sequences that grow in a paged cache, any number of rows a step. Blocks are handed out interleaved."""

    def __init__(self, model, count: int, block_size: int = 8, cache_dtype: torch.dtype = torch.float32) -> None:
        config = model.config
        per_sequence = -(-config.max_position_embeddings // block_size)
        self.model, self.block_size = model, block_size
        self.store = KVStore(
            count * per_sequence + 1, config.num_layers, config.num_kv_heads, block_size, config.head_dim, cache_dtype
        )
        self.tables = [list(range(1 + i, 1 + count * per_sequence, count)) for i in range(count)]
        self.done = [0] * count

    def step(self, parts: dict[int, list[int]], rows: torch.Tensor | None = None) -> torch.Tensor:
        """Compute `parts[s]` new tokens of each sequence s: logits [T, V], or of `rows`."""
        starts, contexts, slots = [0], [], []
        positions: list[int] = []
        for s, tokens in parts.items():
            at = range(self.done[s], self.done[s] + len(tokens))
            starts.append(starts[-1] + len(tokens))
            contexts.append(at.stop)
            positions += at
            size = self.block_size
            slots += [self.tables[s][p // size] * size + p % size for p in at]
            self.done[s] = at.stop
        width = max(-(-c // self.block_size) for c in contexts)
        table = [(self.tables[s][: -(-c // self.block_size)] + [0] * width)[:width] for s, c in zip(parts, contexts)]
        meta = AttentionMeta(
            torch.tensor(table, dtype=torch.int32),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(contexts, dtype=torch.int32),
            torch.tensor(slots, dtype=torch.int32),
            max_query=max(map(len, parts.values())),
            max_context=max(contexts),
        )
        ids = torch.tensor([token for tokens in parts.values() for token in tokens])
        ctx = PagedContext(self.model.ops, self.store, meta, self.model.config)
        return self.model(ids, torch.tensor(positions, dtype=torch.int32), ctx, rows)


@pytest.fixture(scope="session")
def paged_run():
    """The `PagedRun` class."""
    return PagedRun


@pytest.fixture(scope="session")
def paged_logits():
    """paged_logits(model, sequences, chunk) → logits [T, V], `chunk` tokens of each sequence a step."""

    def run(model, sequences: list[list[int]], chunk: int, **options: Any) -> torch.Tensor:
        paged = PagedRun(model, len(sequences), **options)
        found: list[list[torch.Tensor]] = [[] for _ in sequences]
        for start in range(0, max(map(len, sequences)), chunk):
            parts = {s: tokens[start : start + chunk] for s, tokens in enumerate(sequences) if start < len(tokens)}
            logits = paged.step(parts).split([len(tokens) for tokens in parts.values()])
            for s, part in zip(parts, logits):
                found[s].append(part)
        return torch.cat([part for parts in found for part in parts])

    return run
