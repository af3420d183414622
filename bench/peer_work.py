"""The loads of `bench/peers.py`, and the figures that their seconds give.

It imports the standard library alone, as the environments of the peers import it too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FULL", "QUICK", "WORKLOADS", "Sizes", "figures", "make_task"]

WORKLOADS = ("dec1", "dec16", "pre", "online", "shared")
FIRST_TOKEN, END_TOKEN = 300, 32000
LENGTHS_SEED = 20260101


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each load asks for; lengths are in tokens."""

    prompt: int = 128
    output: int = 128
    batch: int = 16
    long_prompt: int = 1024
    requests: int = 32
    prompts: tuple[int, int] = (32, 512)
    outputs: tuple[int, int] = (16, 128)
    prefix: int = 512


FULL = Sizes()
QUICK = Sizes(16, 6, 4, 64, 4, (8, 32), (2, 6), 32)


def make_task(name: str, sizes: Sizes, turn: int) -> dict[str, Any]:
    """Make one load: {"name", "calls": [(prompts, output lengths), …], "prefix": shared tokens at the front}.

    Lengths are the same in every round, and tokens differ between rounds and calls, so no cache has seen a prompt.
    "warm" runs a little of each kind.
    """
    draw = random.Random(f"{name} {turn}")

    def prompts(lengths: Sequence[int]) -> list[list[int]]:
        return [[draw.randrange(FIRST_TOKEN, END_TOKEN) for _ in range(length)] for length in lengths]

    batch = {"dec1": 1, "dec16": sizes.batch}.get(name, 0)
    if batch:
        lengths = [sizes.prompt] * batch
        calls = [(prompts(lengths), [outputs] * batch) for outputs in (1, sizes.output)]
    elif name == "pre":
        calls = [(prompts([sizes.long_prompt]), [1])]
    elif name == "warm":
        many = [sizes.prompt] * sizes.batch
        calls = [
            (prompts([sizes.prompt]), [4]),
            (prompts(many), [4] * sizes.batch),
            (prompts([sizes.long_prompt]), [1]),
        ]
    else:
        pairs = random.Random(LENGTHS_SEED)
        wanted = [(pairs.randint(*sizes.prompts), pairs.randint(*sizes.outputs)) for _ in range(sizes.requests)]
        [prefix] = prompts([sizes.prefix if name == "shared" else 0])
        calls = [([prefix + rest for rest in prompts([p for p, _ in wanted])], [o for _, o in wanted])]
    return {"name": name, "calls": calls, "prefix": sizes.prefix if name == "shared" else 0}


def figures(task: dict[str, Any], seconds: Sequence[float]) -> dict[str, float]:
    """Give tokens a second from the seconds of each call: "rate" and, for dec16, "decode" without the prefill."""
    prompts, outputs = task["calls"][-1]
    if task["name"] == "pre":
        return {"rate": len(prompts[0]) / seconds[0]}
    if task["name"] not in ("dec1", "dec16"):
        return {"rate": sum(outputs) / seconds[-1]}
    decode = (sum(outputs) - len(outputs)) / max(seconds[1] - seconds[0], 1e-6)
    if task["name"] == "dec1":
        return {"rate": decode}
    return {"rate": sum(outputs) / seconds[1], "decode": decode}
