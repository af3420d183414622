"""`Batch`: a plan as packed tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.engine.run.shard import Inputs
from headrace.engine.schedule.plan import PREVIOUS, SAMPLE, Plan, Slice
from headrace.kernels.ops import AttentionMeta, SampleParams

__all__ = ["Batch", "BatchBuilder"]

WORD = 0xFFFFFFFFFFFFFFFF


@dataclass(slots=True)
class Batch:
    """One step, packed. R rows with logits, E edits, all on the ops' device except `params`."""

    inputs: Inputs
    targets: list[int]
    """Per row with logits: `SAMPLE` or the known token to score."""
    sample_rows: list[int]
    """Which of the R rows are sampled, in the order of the slices."""
    sampled: list[tuple[Slice, int]]
    """The slice of each of these rows, and the drafts of it that the row has seen."""
    previous: list[tuple[int, int]]
    """(row of ids_T, request id): the token is the one sampled for this request by the step before."""
    params: SampleParams
    edits: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """(row among the sampled ones, token id, divide, add), as `Ops.edit_logits_` takes them."""


class BatchBuilder:
    """Packs plans. Unused entries of the block table are 0, the null block."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device

    def build(self, plan: Plan) -> Batch:
        """The packed form of `plan`."""
        slices, size = plan.slices, self.block_size
        contexts = [s.start + len(s.token_ids) for s in slices]
        ends = list(itertools.accumulate(len(s.token_ids) for s in slices))
        places = [range(s.start, context) for s, context in zip(slices, contexts)]
        slots = [s.block_table[at // size] * size + at % size for s, place in zip(slices, places) for at in place]
        chained = itertools.chain.from_iterable
        meta = AttentionMeta(
            self._tensor(self._block_table(slices, contexts)),
            self._tensor(np.asarray([0, *ends], np.int32)),
            self._tensor(np.asarray(contexts, np.int32)),
            self._tensor(np.asarray(slots, np.int32)),
            max(map(len, places)),
            max(contexts),
        )
        previous = [(end - 1, s.request_id) for s, end in zip(slices, ends) if s.token_ids[-1] == PREVIOUS]
        targets = [t for s in slices for t in s.targets]
        rows = [end - len(s.targets) + i for s, end in zip(slices, ends) for i in range(len(s.targets))]
        sampled = [(s, row) for s in slices for row in range(s.samples)]
        return Batch(
            inputs=Inputs(
                self._tensor(np.fromiter(chained(s.token_ids for s in slices), np.int64, ends[-1])),
                self._tensor(np.fromiter(chained(places), np.int64, ends[-1])),
                meta,
                self._tensor(np.asarray(rows, np.int64)),
            ),
            targets=targets,
            sample_rows=[i for i, t in enumerate(targets) if t == SAMPLE],
            sampled=sampled,
            previous=previous,
            params=_sample_params(sampled),
            edits=self._edits(sampled),
        )

    def _block_table(self, slices: Sequence[Slice], contexts: Sequence[int]) -> np.ndarray:
        table = np.zeros((len(slices), -(-max(contexts) // self.block_size)), np.int32)
        for row, s, context in zip(table, slices, contexts):
            used = -(-context // self.block_size)
            row[:used] = s.block_table[:used]
        return table

    def _edits(self, sampled: Sequence[tuple[Slice, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        each = ((at, s.edits[row]) for at, (s, row) in enumerate(sampled) if s.edits)
        edited = [(at, edits) for at, edits in each if edits is not None]
        if not edited:
            return None
        rows = np.repeat([at for at, _ in edited], [len(e.token_ids) for _, e in edited])
        ids = np.concatenate([np.asarray(e.token_ids, np.int64) for _, e in edited])
        divide = np.concatenate([np.asarray(e.divide, np.float32) for _, e in edited])
        add = np.concatenate([np.asarray(e.add, np.float32) for _, e in edited])
        return (self._tensor(rows.astype(np.int64)), self._tensor(ids), self._tensor(divide), self._tensor(add))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _sample_params(sampled: Sequence[tuple[Slice, int]]) -> SampleParams:
    params = [s.params for s, _ in sampled]
    reals = np.array(
        [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]], np.float32
    )
    words = np.array(
        [
            [p.top_k & WORD for p in params],
            [s.seed & WORD for s, _ in sampled],
            [s.choice & WORD for s, _ in sampled],
            [s.start + len(s.token_ids) - s.samples + 1 + row for s, row in sampled],
        ],
        np.uint64,
    ).view(np.int64)
    temperature_R, top_p_R, min_p_R = map(torch.from_numpy, reals)
    top_k_R, seed_R, choice_R, position_R = map(torch.from_numpy, words)
    return SampleParams(temperature_R, top_k_R, top_p_R, min_p_R, seed_R, choice_R, position_R)
