"""How a step is filled with tokens: one small file per paper, behind `Batching`."""

from __future__ import annotations

from headrace.engine.schedule.batching.base import Batching
from headrace.engine.schedule.batching.orca import Orca
from headrace.engine.schedule.batching.sarathi import Sarathi
from headrace.engine.schedule.batching.static import Static

__all__ = ["Batching", "Orca", "Sarathi", "Static", "make_batching"]


def make_batching(name: str, budget: int, max_num_seqs: int) -> Batching:
    """The batching called `name`, one of `config.BATCHING`, for `budget` tokens a step."""
    kinds: dict[str, type[Orca] | type[Sarathi] | type[Static]] = {"orca": Orca, "sarathi": Sarathi, "static": Static}
    return kinds[name](budget, max_num_seqs)
