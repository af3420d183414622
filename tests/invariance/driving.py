"""Steps an engine through requests, and keeps every token and every logit that it sampled from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from headrace.engine.engine import Engine
from headrace.engine.schedule.request import Request

__all__ = ["Recorder", "Trace", "drive", "numbered"]


@dataclass
class Trace:
    """What one request gave: its tokens, and the logits each was drawn from, by position."""

    tokens: list[int] = field(default_factory=list)
    logits: dict[int, bytes] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "logits": {p: row.hex() for p, row in self.logits.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trace:
        return cls(data["tokens"], {int(p): bytes.fromhex(row) for p, row in data["logits"].items()})


class Recorder:
    """Stands before a runner and keeps the logits of every row that is sampled or scored."""

    def __init__(self, engine: Engine) -> None:
        self.traces: dict[int, Trace] = {}
        self._plan: Any = None
        runner = engine.runner
        submit, logits = runner.submit, runner.logits

        def spy_submit(plan: Any) -> Any:
            self._plan = plan
            return submit(plan)

        def spy_logits(batch: Any) -> torch.Tensor:
            rows = logits(batch)
            taken = iter(rows)
            for s in self._plan.slices:
                end = s.start + len(s.token_ids) + 1
                for position in range(end - len(s.targets), end):
                    self.trace(s.request_id).logits[position] = next(taken).numpy().tobytes()
            return rows

        runner.submit, runner.logits = spy_submit, spy_logits

    def trace(self, request_id: int) -> Trace:
        return self.traces.setdefault(request_id, Trace())


def drive(engine: Engine, batches: Iterable[list[Request]], steps: int | None = None) -> dict[int, list[int]]:
    """Add one batch before each step and run to the end, or for `steps` steps: output tokens by request."""
    tokens: dict[int, list[int]] = {}
    waiting, count = iter(batches), 0
    while count != steps:
        batch = next(waiting, None)
        if batch is None and not engine.has_work:
            break
        for item in batch or ():
            engine.scheduler.add(item)
        for update in engine.step():
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
        count += 1
    return tokens


def numbered(number: int, item: Request) -> Request:
    """A new request like `item`, under another number."""
    return Request(number, item.prompt_token_ids, item.params, seed=item.seed, choice=item.choice)
