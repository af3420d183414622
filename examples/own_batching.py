"""A batching policy of your own: it changes when a token is computed, and never which.

python examples/own_batching.py runs/demo/hf      # prints the steps of two policies, and "the same tokens"
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from headrace import LLM, SamplingParams
from headrace.engine.schedule.batching import BATCHING

PROMPTS = ["Once upon a time, Mia lived at the market. One day Mia took the red lamp and went out.", "One day", "Tom"]


class Fair:
    """Decodes first; prompts then share the rest of the step evenly, so a short one does not wait for a long one."""

    joins_empty = False

    def __init__(self, budget: int, max_num_seqs: int) -> None:
        self.budget = budget
        self.seats = min(max_num_seqs, budget)
        self._left = budget

    def share(self, remaining: Sequence[int], following: Sequence[int]) -> list[int]:
        granted = [count if count <= 1 + more else 0 for count, more in zip(remaining, following)]
        self._left = self.budget - sum(granted)
        prompts = [i for i, count in enumerate(remaining) if count and not granted[i]]
        for number, i in enumerate(prompts):
            granted[i] = min(remaining[i], self._left // (len(prompts) - number))
            self._left -= granted[i]
        return granted

    def admits(self, group_id: int, running_groups: Collection[int]) -> bool:
        return self._left > 0

    def first(self, remaining: int) -> int:
        return min(remaining, self._left)

    @property
    def spare(self) -> int:
        return self._left

    def take(self, tokens: int) -> None:
        self._left -= tokens


BATCHING["fair"] = Fair


def main(checkpoint: str) -> None:
    """Generate with headrace's policy and with ours, twelve tokens a step."""
    params = [SamplingParams(max_tokens=16, seed=i, ignore_eos=True) for i in range(len(PROMPTS))]
    tokens = []
    for batching in ("sarathi", "fair"):
        with LLM(checkpoint, batching=batching, max_num_batched_tokens=12) as llm:
            tokens.append([output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)])
        print(f"{batching}: {llm.tokenizer.decode(tokens[-1][1])!r}")
    print("the same tokens" if tokens[0] == tokens[1] else "other tokens: a bug in headrace")


if __name__ == "__main__":
    main(*sys.argv[1:])
