"""Training beside plain PyTorch: the same weights, the same texts, in turn on the same cores.

    python bench/train.py [--quick] [--only 12m|1m]

    1 process × 2 threads   ours / transformers' model with fused AdamW / the same under torch.compile
    2 processes × 1 thread  ours with parallel.tensor=2 / torch.distributed.tensor's tensor parallelism on gloo
    the cost of fixed sums: ours with 4 virtual shards / with one

Prints tokens per second, ratios of neighbouring runs, peak memory and the share of communication, and
writes docs/results/train.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.bench.measure import Pairs, interleave, rates, write_results
from headrace.config import ModelConfig
from headrace.kernels.ops import load_ops
from headrace.model.huggingface import save_model
from headrace.model.transformer import Transformer
from headrace.train.config import DataConfig
from headrace.train.corpus.build import BuildConfig, build
from headrace.train.data import open_source
from sides import Side

SIZES = {
    "12m": (ModelConfig("LlamaForCausalLM", 8192, 384, 1024, 6, 6, 2, 64, 1024, tie_word_embeddings=True), 8, 256),
    "1m": (ModelConfig("LlamaForCausalLM", 512, 128, 384, 4, 4, 4, 32, 512, tie_word_embeddings=True), 4, 256),
}
SCRIPT = Path(__file__).with_name("train_sides.py")
RECIPE = """
[optimizer]
learning_rate = 1e-4

[data]
shuffle = "pieces"

[train]
steps = 100000
"""


def main() -> None:
    """Run all comparisons, or the chosen ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one step per round, to try the script")
    parser.add_argument("--only", choices=sorted(SIZES), action="append")
    arguments = parser.parse_args()
    steps, pairs = (1, 1) if arguments.quick else (3, 5)
    results: dict[str, Any] = {"rates": rates(2)}
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.only or SIZES:
            print(f"\n{name}")
            results[name] = compare(Path(work), name, steps, pairs)
    if not arguments.quick:
        print(f"\n{write_results('train', results)}")


def compare(work: Path, name: str, steps: int, pairs: int) -> dict[str, Any]:
    """Run every comparison of one model size."""
    config, rows, tokens = SIZES[name]
    data = corpus(work, config.vocab_size)
    folder = checkpoint(work / name, data, config)
    single = checkpoint(work / f"{name}-one-shard", data, replace(config, virtual_shards=1))
    found: dict[str, Any] = {}
    one = (data, rows, tokens, 2, 1)
    two = (data, rows, tokens, 1, 2)
    for label, ours, theirs in (
        ("eager", ("headrace", folder, *one), ("torch", folder, *one)),
        ("compiled", ("headrace", folder, *one), ("compile", folder, *one)),
        ("two ranks", ("headrace", folder, *two), ("dtensor", folder, *two)),
        ("fixed sums", ("headrace", folder, *one), ("headrace", single, *one)),
    ):
        found[label] = beside(ours, theirs, rows * tokens, steps, pairs)
        report(label, found[label])
    return found


def beside(ours: tuple[Any, ...], theirs: tuple[Any, ...], tokens: int, steps: int, pairs: int) -> dict[str, Any]:
    """Two sides in turn: tokens per second of each round, and each side's last figures."""
    sides = [Side(SCRIPT, words, ranks) for *words, ranks in (ours, theirs)]
    last: list[dict[str, Any]] = [{}, {}]

    def measure(i: int) -> float:
        last[i] = sides[i].run(steps)
        return tokens / statistics.median(last[i]["seconds"])

    try:
        found: Pairs = interleave(lambda: measure(0), lambda: measure(1), pairs, warm=2)
    finally:
        for side in sides:
            side.close()
    figures = last[0]
    share = figures.get("communication", 0.0) / figures["seconds"][-1]
    return {
        "tokens_per_second": found,
        "memory": [one["memory"] for one in last],
        "communication_share": share,
        "bytes_sent": figures.get("bytes", 0),
        "loss": [one["loss"] for one in last],
    }


def report(label: str, found: dict[str, Any]) -> None:
    """One line."""
    speed, (ours, theirs) = found["tokens_per_second"], found["memory"]
    print(
        f"  {label:11s} {statistics.median(speed.ours):6.0f} / {statistics.median(speed.theirs):6.0f} tokens/s  "
        f"{speed.verdict:26s} memory {ours / 2**20:5.0f} / {theirs / 2**20:5.0f} MiB  "
        f"communication {found['communication_share']:.0%}",
        flush=True,
    )


def corpus(work: Path, vocab_size: int) -> Path:
    """A folder of real text where HEADRACE_DATA has it, else of tinyworld, with a vocabulary of this size."""
    out = work / f"data-{vocab_size}"
    if not out.exists():
        text = Path(os.environ.get("HEADRACE_DATA", Path(__file__).parents[2] / "shared" / "data"))
        file = text / "text" / "quickstart_pd_1mb.txt"
        inputs = (str(file),) if file.exists() else ("tinyworld",)
        build(BuildConfig(inputs, out, vocab_size=vocab_size))
    return out


def checkpoint(folder: Path, data: Path, config: ModelConfig) -> Path:
    """The folder from which both sides start: random weights, the data's tokenizer, our recipe."""
    model = Transformer(config, load_ops("reference"))
    model.init_weights(0)
    save_model(model, folder)
    open_source(DataConfig(str(data), 0).resolved()).tokenizer.save(folder)
    shards = f"\n[model]\nvirtual_shards = {config.virtual_shards}\n"
    (folder / "recipe.toml").write_text(RECIPE + shards)
    return folder


if __name__ == "__main__":
    main()
