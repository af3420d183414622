"""What an axis of the matrix is. Each file in `axes/` holds one, as `AXIS`; `invariance.cells` finds them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.engine.engine import Engine
from headrace.engine.schedule.request import Request
from headrace.speculate.base import Gamma, Proposer

__all__ = ["PROMPTS", "TOKENS", "Axis", "Mutant", "Setup"]

TOKENS = 12
"""Output tokens of each request."""
PROMPTS = 64

Batches = list[list[Request]]


@dataclass
class Setup:
    """How the engine of one cell is made, and what it is asked. Each axis sets its part."""

    model: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`."""
    prompts: list[int] = field(default_factory=list)
    """Numbers of the prompts that run."""
    threads: int = 1
    ranks: int = 1
    serving: bool = False
    """Whether the model is loaded to serve."""
    sequences: int = PROMPTS + 8
    """The cache has room for this many of the longest sequences, and for `spare_tokens` more."""
    spare_tokens: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of `EngineOptions`."""
    gamma: Gamma | None = None
    """The policy of γ; None where nobody drafts."""
    proposers: list[Proposer] = field(default_factory=list)
    draft: bool = False
    """Whether the model itself drafts, its weights rounded to bf16."""


class Mutant:
    """A deliberate mistake: `mistake(monkeypatch)` must turn the cell with these values red, and only for its axis."""

    def __init__(self, mistake: Callable[[Any], None], **values: Any) -> None:
        self.mistake = mistake
        self.values = values


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One way in which the same work may be arranged. Every hook gets the cell's value on this axis last."""

    values: tuple[Any, ...]
    """The plainest first: the baseline runs with it, and so does every cell that does not name the axis."""
    setup: Callable[[Setup, Any], None] | None = None
    """Changes how the engine is made and what it is asked."""
    prepare: Callable[[Engine, list[Request], Any], None] | None = None
    """Changes the new engine, or runs something in it, before the requests arrive and anything is recorded."""
    requests: Callable[[list[Request], Any], list[Request]] | None = None
    """Changes what runs, before it is known when it arrives. Requests with numbers above `PROMPTS` are not compared."""
    arrivals: Callable[[Batches, Any], Batches] | None = None
    """Changes which requests arrive before which step. At first all of them arrive before step 0."""
    play: Callable[[Any, Any], dict[int, Any]] | None = None
    """Runs the requests of a `harness.Run` in another way than step by step to the end; called for every value but
    the plainest. It gives the rest to `Run.elsewhere` with this axis at its plainest, so that such axes combine."""
    question: bool = False
    """Whether other values ask for other tokens: each value has a baseline, and the axis needs no mutant."""
    costly: Mapping[Any, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    """Values too slow for `make test` to combine with all others: there they run in these cells alone."""
    mutants: tuple[Mutant, ...] = ()
