"""The sides of a comparison, each in its own process, so that thread pools do not disturb each other.

    python bench/workers.py headrace|torch-slots|transformers CHECKPOINT THREADS

Reads a JSON job list a line, runs it, and answers with a JSON line of the times. A worker that is not being
measured waits on its standard input and computes nothing.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Side:
    """The benchmark's handle of a worker process."""

    def __init__(self, kind: str, checkpoint: Path, threads: int, python: str = sys.executable) -> None:
        self.kind = kind
        self._process = subprocess.Popen(
            [python, __file__, kind, str(checkpoint), str(threads)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, jobs: Sequence[tuple[Any, ...]], repeat_seed: int = 0, **options: Any) -> dict[str, Any]:
        """`jobs` are (prompt, output tokens, …); returns seconds, first-token seconds and token times where known."""
        assert self._process.stdin is not None and self._process.stdout is not None
        jobs = [([2 + (t + 977 * repeat_seed) % 31000 for t in prompt], out, *rest) for prompt, out, *rest in jobs]
        self._process.stdin.write(json.dumps({"jobs": jobs, "options": options}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the {self.kind} worker ended: its standard error has the cause")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def headrace(checkpoint: str, threads: int, torch_slots: bool = False) -> Any:
    """Our engine: a new one with an empty cache for every run, on one loaded model."""
    from headrace.bench.load import Job, run_jobs
    from headrace.kernels.load import load_ops
    from headrace.llm.assemble import assemble
    from headrace.llm.options import EngineOptions
    from headrace.model.huggingface import load_model

    if torch_slots:
        from torch_slots import TorchSlots

        ops: Any = TorchSlots(threads)
    else:
        ops = load_ops("cpu", threads=threads)
    model = load_model(Path(checkpoint), ops, "float32" if torch_slots else "auto", serving=not torch_slots)

    def run(jobs: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        defaults = {"max_num_seqs": 64, "kv_cache_memory": "1GiB", "threads": threads, "max_num_batched_tokens": 512}
        engine = assemble(model, ops, EngineOptions(**{**defaults, **options}))
        outcome = run_jobs(engine, [Job(*job) for job in jobs])
        stats = engine.scheduler.stats
        return {
            "seconds": outcome.seconds,
            "times": list(outcome.times.values()),
            "steps": outcome.steps,
            "used": stats.used_slot_steps,
            "held": stats.held_slot_steps,
            "tokens": list(outcome.tokens.values()),
        }

    return run


def transformers(checkpoint: str, threads: int) -> Any:
    """`generate` on one left-padded batch, in fp32: its fastest dtype on a CPU without bf16 instructions."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1

    @torch.inference_mode()
    def run(jobs: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        prompts, outputs = [job[0] for job in jobs], [job[1] for job in jobs]
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), 1)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        start = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=1)
        first = time.perf_counter() - start
        if max(outputs) == 1:
            return {"seconds": first, "first": first}
        start = time.perf_counter()
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max(outputs), do_sample=False, pad_token_id=1
        )
        assert out.shape[1] == longest + max(outputs)
        return {"seconds": time.perf_counter() - start, "first": first}

    return run


def main() -> None:
    """Serve one side."""
    kind, checkpoint, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    out, sys.stdout = sys.stdout, sys.stderr
    run = {
        "headrace": lambda: headrace(checkpoint, threads),
        "torch-slots": lambda: headrace(checkpoint, threads, torch_slots=True),
        "transformers": lambda: transformers(checkpoint, threads),
    }[kind]()
    for line in sys.stdin:
        job, cpu = json.loads(line), time.process_time()
        answer = run(job["jobs"], job["options"])
        answer["cpu"] = time.process_time() - cpu
        gc.collect()
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
