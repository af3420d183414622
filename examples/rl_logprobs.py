"""Reinforcement learning: the trainer's log-probabilities of sampled tokens equal the server's, bit for bit.

It trains a small model briefly and serves it, samples completions over HTTP, and recomputes their log-probabilities in
the trainer, packed in one batch. Then the policy takes a step, a live engine gets its weights, and both agree again.

    python examples/rl_logprobs.py          # prints max |Δ| = 0, twice
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import torch

from headrace import LLM, SamplingParams
from headrace.kernels.load import load_ops
from headrace.train.config import load_recipe
from headrace.train.data import TrainingBatch, batch_of
from headrace.train.run import train
from headrace.train.trainer import Trainer

RECIPE = "demo"
PROMPTS = ["Once upon a time, Mia", "One day, Tom went to", "Once upon a time, there"]
RATE = 1e-3


def main() -> None:
    """Sample, recompute and compare; update the policy, and repeat."""
    with tempfile.TemporaryDirectory() as folder:
        ops = load_ops("cpu")
        checkpoint = train(
            load_recipe(RECIPE, ["train.steps=30", "train.sample_every=0"]), Path(folder) / "run", ops=ops
        ).checkpoint
        trainer = Trainer(load_recipe(RECIPE, [f"model.init={checkpoint}"]), ops)
        batch, sampled = sample_over_http(checkpoint)
        logprobs = trainer.log_probabilities(batch)
        print(f"{len(sampled)} tokens sampled over HTTP: max |Δ| = {difference(logprobs, sampled):g}")

        policy_gradient_step(trainer, logprobs)
        with LLM(checkpoint) as llm:
            llm.update_weights(trainer.model)
            batch, sampled = sample(llm)
            again = trainer.log_probabilities(batch)
            print(f"{len(sampled)} tokens sampled after an update: max |Δ| = {difference(again, sampled):g}")


def difference(ours: torch.Tensor, theirs: list[float]) -> float:
    """The greatest difference between the trainer's log-probabilities and the sampler's."""
    return float((ours.detach().double() - torch.tensor(theirs, dtype=torch.float64)).abs().max())


def policy_gradient_step(trainer: Trainer, logprobs: torch.Tensor) -> None:
    """A step of REINFORCE with a reward of 1: make the sampled tokens a little more likely."""
    grads = torch.autograd.grad(-logprobs.mean(), trainer.parameters)
    with torch.no_grad():
        for parameter, grad in zip(trainer.parameters, grads):
            parameter.sub_(RATE * grad)


def sample_over_http(checkpoint: Path) -> tuple[TrainingBatch, list[float]]:
    """Completions from `headrace serve`, as a batch, and the log-probabilities that it reported."""
    server = subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", str(checkpoint), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = re.search(r"http://\S+", server.stdout.readline())
        assert url is not None
        rows, scores = [], []
        for seed, prompt in enumerate(PROMPTS):
            asked = {
                "prompt": prompt,
                "max_tokens": 24,
                "temperature": 1.0,
                "seed": seed,
                "logprobs": 1,
                "return_token_ids": True,
            }
            request = urllib.request.Request(
                f"{url[0]}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as answer:
                choice = json.load(answer)["choices"][0]
            rows.append((choice["prompt_token_ids"], choice["token_ids"]))
            scores += choice["logprobs"]["token_logprobs"]
        return as_batch(rows), scores
    finally:
        server.terminate()
        server.wait()


def sample(llm: LLM) -> tuple[TrainingBatch, list[float]]:
    """The same, from an engine in this process."""
    outputs = llm.generate(PROMPTS, [SamplingParams(max_tokens=24, seed=i, logprobs=1) for i in range(len(PROMPTS))])
    choices = [output.outputs[0] for output in outputs]
    scores = [table[token].logprob for c in choices for token, table in zip(c.token_ids, c.logprobs or [])]
    return as_batch([(o.prompt_token_ids, c.token_ids) for o, c in zip(outputs, choices)]), scores


def as_batch(rows: list[tuple[list[int], list[int]]]) -> TrainingBatch:
    """Prompts and completions, packed; the completions' tokens count."""
    return batch_of([([*prompt, *out], [False] * len(prompt) + [True] * len(out)) for prompt, out in rows])


if __name__ == "__main__":
    main()
