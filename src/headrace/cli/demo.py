"""`headrace demo`: train a small model on tinyworld, test it, and serve it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from headrace.cli.demo_server import REPLY_TOKENS, serve_demo
from headrace.cli.extras import require_extra
from headrace.cli.progress import kernels
from headrace.cli.train import TrainingView, add_overrides

__all__ = ["add"]

OUT = Path("runs/demo")
NEW = Path("runs/demo.new")
"""The folder of a run in progress."""
OLD = Path("runs/demo.old")
"""The former `OUT`, while `NEW` is renamed to `OUT`."""
SAMPLE_SECONDS = 15.0
EXAM_QUESTIONS = 200
LONGEST_PROMPT = 96


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "demo",
        help="train a small model here and serve it, in a few minutes",
        description="Train a 1M-parameter model on generated texts and serve it.",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="train again without asking, replace runs/demo, and end after a few requests",
    )
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train, test and serve; the figures are in `runs/demo/summary.json`."""
    for extra in ("train", "serve"):
        require_extra("demo", extra)
    _recover()
    trained = {} if _keep(arguments) else _train(arguments.overrides)
    from headrace.llm.llm import LLM

    checkpoint = OUT / "hf"
    summary = {**_earlier(), **trained, "accuracy": _exam(LLM(checkpoint))}
    summary |= _same_bits(checkpoint)
    summary |= _cache(checkpoint)
    summary |= {**_reply(LLM(checkpoint)), "checkpoint": str(checkpoint.resolve())}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        "\nTry later:\n"
        f'  headrace generate {checkpoint} --prompt "Once upon a time, Mia" --max-tokens 60 --temperature 0\n'
        f"  headrace chat {checkpoint}\n"
        f"  headrace train demo --out runs/mine --set train.steps=900\n"
        f"  headrace reproduce paged"
    )
    serve_demo(checkpoint, summary, arguments.once)


def _recover() -> None:
    """Rename `OLD` back to `OUT` if an earlier run ended within `_swap`."""
    if OLD.is_dir() and not OUT.exists():
        OLD.rename(OUT)


def _swap() -> None:
    """Replace `OUT` by `NEW`. Killed at any point, it leaves a complete model in `OUT` or `OLD`."""
    shutil.rmtree(OLD, ignore_errors=True)
    if OUT.exists():
        OUT.rename(OLD)
    NEW.rename(OUT)
    shutil.rmtree(OLD, ignore_errors=True)


def _keep(arguments: argparse.Namespace) -> bool:
    """Whether to use the model of an earlier run."""
    if arguments.once or not (OUT / "hf" / "config.json").is_file():
        return False
    if not sys.stdin.isatty():
        print(f"using the model in {OUT}/hf; --once trains again")
        return True
    return input(f"There is a trained model in {OUT}/hf. Use it? [Y/n] ").strip().lower() not in ("n", "no")


def _earlier() -> dict[str, Any]:
    file = OUT / "summary.json"
    if not file.is_file():
        return {}
    try:
        summary = json.loads(file.read_text())
    except (OSError, ValueError):
        summary = None
    if not isinstance(summary, dict):
        print(f"{file} cannot be read: the figures of the training will be missing")
        return {}
    return summary


def _train(overrides: list[str]) -> dict[str, Any]:
    """Train into `NEW`, then replace `OUT`; a run that fails or is stopped leaves `OUT` unchanged."""
    from headrace.train.config import load_recipe

    recipe = load_recipe("demo", ["train.sample_every=5", *overrides])
    ops = kernels(recipe.train.kernels)
    print("Training on tinyworld: stories of a made-up small world, questions about them, sums, lists as JSON, a tool.")
    shutil.rmtree(NEW, ignore_errors=True)
    began = time.perf_counter()
    try:
        result = _fit(recipe, ops)
    except BaseException:
        shutil.rmtree(NEW, ignore_errors=True)
        raise
    seconds = time.perf_counter() - began
    _swap()
    print(
        f"trained in {seconds:.0f} s: loss {result.first_loss:.3f} → {result.final_loss:.3f}, "
        f"on held-out texts {result.validation_loss:.3f}. Wrote {OUT / 'hf'}"
    )
    return {
        "train_seconds": seconds,
        "first_loss": result.first_loss,
        "final_loss": result.final_loss,
        "validation_loss": result.validation_loss,
    }


def _fit(recipe: Any, ops: Any) -> Any:
    from headrace.train.run import train

    with TrainingView(recipe, ops, SAMPLE_SECONDS) as view:
        return train(recipe, NEW, view.step, view.sample, ops=ops, warn=view.warn)


def _exam(llm: Any) -> float:
    from headrace.engine.schedule.sampling import SamplingParams
    from headrace.train import tinyworld

    def generate(prompts: list[str]) -> list[str]:
        return [
            o.outputs[0].text for o in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=REPLY_TOKENS))
        ]

    shares = tinyworld.accuracy(generate, EXAM_QUESTIONS)
    print(f"\nExam on combinations that training never showed: {shares['overall']:.1%} right")
    print("  " + " · ".join(f"{name} {share:.0%}" for name, share in shares.items() if name != "overall"))
    return shares["overall"]


def _same_bits(checkpoint: Path) -> dict[str, Any]:
    """32 prompts alone, then together with preemption in 7-token chunks: the results must be equal."""
    from headrace.engine.schedule.sampling import SamplingParams
    from headrace.llm.llm import LLM
    from headrace.train import tinyworld

    plain = LLM(checkpoint)
    prompts = [p for p in tinyworld.prompts(96) if len(plain.tokenizer.encode(p)) <= LONGEST_PROMPT][:32]
    whole: dict[str, Any] = {"max_tokens": REPLY_TOKENS, "logprobs": 0, "ignore_eos": True}
    params = [SamplingParams(temperature=0.8 * (i % 2), seed=i, **whole) for i in range(32)]
    alone = [plain.generate(p, q)[0].outputs[0] for p, q in zip(prompts, params)]
    began = time.perf_counter()
    together = LLM(checkpoint).generate(prompts, params)
    speed = sum(len(o.outputs[0].token_ids) for o in together) / (time.perf_counter() - began)
    blocks = 2 + -(-(LONGEST_PROMPT + REPLY_TOKENS) // 8)
    crowded = LLM(checkpoint, num_kv_blocks=blocks, block_size=8, max_num_batched_tokens=7)
    outputs = [o.outputs[0] for o in crowded.generate(prompts, params)]
    same = sum(a == b for a, b in zip(alone, outputs))
    stats = crowded.frontend.engine.scheduler.stats
    print(
        f"\n32 prompts at once, in 7-token chunks, with a cache too small for them ({stats.preemptions} preemptions):"
    )
    print(f"  {same}/32 replies bit-identical to solo (tokens and log-probabilities)")
    print(f"  undisturbed: {speed:,.0f} tokens/s")
    if same != 32 or not stats.preemptions:
        raise RuntimeError(
            f"{same} of 32 replies are the same bits after {stats.preemptions} preemptions: a bug in headrace"
        )
    return {"tokens_per_second": speed}


def _cache(checkpoint: Path) -> dict[str, Any]:
    """Time the first token of a prompt twice: the second time its keys and values are in the cache."""
    from headrace.engine.schedule.sampling import SamplingParams
    from headrace.llm.llm import LLM
    from headrace.train import tinyworld

    llm = LLM(checkpoint)
    prompt = max(tinyworld.prompts(32), key=len)
    params = SamplingParams(temperature=0.0, max_tokens=8)

    def first_token(text: str) -> tuple[float, Any]:
        began = time.perf_counter()
        stream = llm.stream(text, params)
        output = next(stream)
        milliseconds = (time.perf_counter() - began) * 1e3
        stream.close()
        return milliseconds, output

    first_token(tinyworld.prompts(33)[32])
    cold, _ = first_token(prompt)
    warm, output = first_token(prompt)
    print(
        f"The same prompt again: cached {output.num_cached_tokens}/{len(output.prompt_token_ids)} tokens, "
        f"TTFT {cold:.1f} → {warm:.1f} ms"
    )
    return {"ttft_ms": cold}


def _reply(llm: Any) -> dict[str, str]:
    from headrace.engine.schedule.sampling import SamplingParams
    from headrace.train import tinyworld

    prompt = tinyworld.prompts(1)[0]
    params = SamplingParams(temperature=0.0, max_tokens=REPLY_TOKENS, ignore_eos=True)
    ids = llm.generate(prompt, params)[0].outputs[0].token_ids
    return {"prompt": prompt, "reply": llm.tokenizer.decode(ids, skip_special_tokens=True)}
