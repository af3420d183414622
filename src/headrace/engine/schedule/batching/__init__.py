"""How a step is filled with tokens: one small file per paper, behind `Batching`."""

from __future__ import annotations

from collections.abc import Callable

from headrace.engine.schedule.batching.base import Batching
from headrace.engine.schedule.batching.orca import Orca
from headrace.engine.schedule.batching.sarathi import Sarathi
from headrace.engine.schedule.batching.static import Static

__all__ = ["BATCHING", "Batching", "Orca", "Sarathi", "Static"]

BATCHING: dict[str, Callable[[int, int], Batching]] = {"sarathi": Sarathi, "orca": Orca, "static": Static}
"""The batching policies by name: made of (tokens a step, requests that may run at once)."""
