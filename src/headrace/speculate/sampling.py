"""Samplers of runners under `--verifier rejection`: the draft's, which keeps what it drew from, and the target's."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.engine.run.batch import Batch
from headrace.kernels.ops import Ops
from headrace.kernels.reference.standard import standardized
from headrace.speculate.rejection import Rejection, draft_params

__all__ = ["DraftSampler", "RejectionSampler"]


class DraftSampler:
    """Draws drafts from the draft model's distribution with noise of their own."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def __call__(self, logits_RV: Tensor, batch: Batch) -> Tensor:
        """See `RowSampler`."""
        q_RV = standardized(logits_RV, batch.params)
        for (s, _), q_V in zip(batch.sampled, q_RV):
            self._drawn[s.request_id, s.start + len(s.token_ids)] = q_V
        return self._ops.sample(logits_RV, draft_params(batch.params))

    def take(self, request_id: int, position: int, count: int) -> Tensor | None:
        """What the drafts of a request from `position` on were drawn from [count, V]; None where it drew none."""
        rows = [self._drawn.pop((request_id, at), None) for at in range(position, position + count)]
        found = [row for row in rows if row is not None]
        return torch.stack(found) if found and len(found) == count else None

    def clear(self) -> None:
        """Forget what no step has asked for."""
        self._drawn.clear()


class RejectionSampler:
    """Algorithm 1 on the rows with drafts; rows without, and greedy ones, are sampled as ever."""

    def __init__(self, ops: Ops, drawn: DraftSampler, lenience: float) -> None:
        self._ops = ops
        self._drawn = drawn
        self._rejection = Rejection(lenience)

    def __call__(self, logits_RV: Tensor, batch: Batch) -> Tensor:
        """See `RowSampler`."""
        tokens_R = self._ops.sample(logits_RV, batch.params)
        rows: list[int] = []
        drafts: list[list[int]] = []
        q: list[Tensor | None] = []
        for row, (s, seen) in enumerate(batch.sampled):
            if s.params.temperature > 0 and s.samples > 1:
                rows.append(row)
                if seen == 0:
                    drafts.append(s.drafts)
                    start = s.start + len(s.token_ids) - len(s.drafts)
                    q.append(self._drawn.take(s.request_id, start, len(s.drafts)))
        self._drawn.clear()
        if rows:
            at = torch.tensor(rows, device=logits_RV.device)
            tokens_R[at] = self._rejection.verify(logits_RV[at], batch.params.take(rows), drafts, q)
        return tokens_R
