"""`Runner`: turns a plan into tokens. It packs a step for every rank, and samples from rank 0's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headrace.cache.manager import BlockMoves
from headrace.engine.run.batch import Batch, BatchBuilder
from headrace.engine.run.frames import frame, step_frame
from headrace.engine.run.masks import MaskFiller, MaskRows
from headrace.engine.run.ranks import Ranks
from headrace.engine.run.shard import ModelShard
from headrace.engine.schedule.plan import SAMPLE, Plan, Slice, SliceResult, StepResult, TokenLogprobs
from headrace.errors import ConfigError, HeadraceError
from headrace.model.huggingface import check_weights, fill_weights, load_weights
from headrace.model.transformer import Transformer

__all__ = ["Handle", "RowSampler", "Runner"]

RowSampler = Callable[[Tensor, Batch], Tensor]
"""(logits of the rows that sample, after edits and masks; the batch) → a token id (int64) for each."""


@dataclass(slots=True)
class Handle:
    """A submitted step. On a GPU its tensors may not be computed yet."""

    plan: Plan
    batch: Batch | None
    sampled: Tensor | None
    logprobs: _Logprobs | None


@dataclass(slots=True)
class _Logprobs:
    """Raw log-probabilities of all R rows with logits: of the sampled or scored token, and the K best."""

    logprob_R: Tensor
    rank_R: Tensor
    top_logprob_RK: Tensor | None
    top_id_RK: Tensor | None


class Runner:
    """Executes plans in the order they are submitted. One thread owns it: kernels are not re-entrant."""

    def __init__(self, shard: ModelShard, ranks: Ranks, sampler: RowSampler | None = None) -> None:
        """`shard` is rank 0's; `ranks` sends each step to the other ranks. `sampler` None is `Ops.sample`."""
        self.model, self.ops, self.store = shard.model, shard.ops, shard.store
        self._shard = shard
        self.ranks = ranks
        self._builder = BatchBuilder(shard.store.block_size, shard.ops.device)
        self.masks = MaskFiller(shard.model.config.vocab_size, shard.ops.device)
        self._sampler = sampler or (lambda logits_RV, batch: self.ops.sample(logits_RV, batch.params))
        self._sampled: dict[int, int] = {}
        self._last: Tensor | None = None

    def submit(self, plan: Plan) -> Handle:
        """Start one step. Blocks move first: out to the host, in from it, then copy-on-write."""
        masks = self.masks.start(plan.slices)  # first: a core is idle while this thread packs the step
        moves = BlockMoves(plan.swap_out, plan.swap_in, plan.copies)
        batch = self._builder.build(plan) if plan.slices else None
        if batch is not None:
            self._resolve_previous(batch)
        if self.ranks.size > 1:
            self.ranks.send(step_frame(moves, None if batch is None else batch.inputs))
        self._shard.move(moves)
        if batch is None:
            return Handle(plan, None, None, None)
        logits_RV = self.logits(batch)
        sampled, logprobs = self._finish(batch, logits_RV, plan.slices, masks())
        self._sampled = {s.request_id: row for row, (s, _) in enumerate(batch.sampled)}
        self._last = sampled
        return Handle(plan, batch, sampled, logprobs)

    def load(self, source: Path | Transformer | Mapping[str, Tensor]) -> None:
        """Load other weights on every rank, from a folder or, with one rank, from memory.

        Raises `HeadraceError` before anything has changed; a later failure is another exception.
        """
        if isinstance(source, Path):
            check_weights(self.model, source)  # before any rank changes anything
            if self.ranks.size > 1:
                self.ranks.send(frame("weights", {"folder": str(source.absolute())}))
            try:
                load_weights(self.model, source)
                self.model.group.barrier()  # the caller may overwrite the files from now on
            except (HeadraceError, RuntimeError) as error:
                failed = RuntimeError(f"{source} was read only in part, so the weights are mixed: {error}")
                raise self.ranks.explain(failed) from error
            return
        if self.ranks.size > 1:
            raise ConfigError("with tensor parallelism, weights come from a checkpoint folder: save them, and name it")
        pieces = {name: piece.read() for name, piece in source.tensors()} if isinstance(source, Transformer) else source
        fill_weights(self.model, pieces)

    def result(self, handle: Handle) -> StepResult:
        """Wait for a submitted step and return its tokens by request."""
        result = StepResult(handle.plan.step)
        if handle.batch is None:
            return result
        tokens = iter(handle.sampled.tolist() if handle.sampled is not None else ())
        rows = _RowReader(handle.logprobs)
        row = 0
        for s in handle.plan.slices:
            out = SliceResult([])
            for target in s.targets:
                token = next(tokens) if target == SAMPLE else target
                records = out.logprobs if target == SAMPLE else out.scores
                if target == SAMPLE:
                    out.token_ids.append(token)
                if s.top is not None:
                    records.append(rows.read(row, token, s.top))
                row += 1
            result.slices[s.request_id] = out
        return result

    def logits(self, batch: Batch) -> Tensor:
        """Raw logits [R, V] of the rows that need them; also stores the KV of every row."""
        try:
            return self._shard.logits(batch.inputs)
        except RuntimeError as error:
            raise self.ranks.explain(error) from error

    def hidden(self, ids: Sequence[int]) -> Tensor:
        """The head's input [T, D] fp32 for one sequence, computed without the cache."""
        if self.ranks.size > 1:
            self.ranks.send(frame("hidden", {"ids": list(ids)}))
        return self._shard.hidden(ids)

    def _resolve_previous(self, batch: Batch) -> None:
        if not batch.previous:
            return
        for _, request in batch.previous:
            if request not in self._sampled:
                raise RuntimeError(f"request {request} has no token from the plan before for PREVIOUS")
        assert self._last is not None  # what has rows in it was sampled
        rows = [row for row, _ in batch.previous]
        batch.inputs.ids_T[rows] = self._last[[self._sampled[request] for _, request in batch.previous]]

    def _finish(
        self, batch: Batch, logits_RV: Tensor, slices: Sequence[Slice], masks: MaskRows | None
    ) -> tuple[Tensor | None, _Logprobs | None]:
        """Sample the rows that ask for it, and score rows against the distribution before edits."""
        tops = [s.top for s in slices if s.targets and s.top is not None]
        if not batch.targets:
            return None, None
        every_row = len(batch.sample_rows) == len(batch.targets)
        edited = batch.edits is not None or masks is not None
        picked_RV = logits_RV
        if not every_row or (tops and edited):
            picked_RV = self.ops.embedding(self._index(batch.sample_rows), logits_RV)
        sampled = None
        if batch.sample_rows:
            if batch.edits is not None:
                self.ops.edit_logits_(picked_RV, *batch.edits)
            if masks is not None:
                self.ops.mask_logits_(picked_RV, *masks)
            sampled = self._sampler(picked_RV, batch)
        return sampled, self._score(batch, logits_RV, sampled, max(tops)) if tops else None

    def _score(self, batch: Batch, logits_RV: Tensor, sampled: Tensor | None, k: int) -> _Logprobs:
        targets_R = torch.tensor(batch.targets, dtype=torch.int64)
        if sampled is not None:
            targets_R[batch.sample_rows] = sampled.cpu()
        lse_R = self.ops.logsumexp(logits_RV, self.model.vocab_bounds)
        logprob_R, rank_R = self.ops.score(logits_RV, lse_R, targets_R.to(self.ops.device))
        best, ids = self.ops.top_logprobs(logits_RV, lse_R, k) if k else (None, None)
        return _Logprobs(logprob_R, rank_R, best, ids)

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64).to(self.ops.device)


class _RowReader:
    """Reads rows of log-probabilities as plain numbers, moved to the host once."""

    def __init__(self, logprobs: _Logprobs | None) -> None:
        if logprobs is None:
            return
        self._logprob: list[float] = logprobs.logprob_R.tolist()
        self._rank: list[int] = logprobs.rank_R.tolist()
        self._top: list[list[float]] = [] if logprobs.top_logprob_RK is None else logprobs.top_logprob_RK.tolist()
        self._ids: list[list[int]] = [] if logprobs.top_id_RK is None else logprobs.top_id_RK.tolist()

    def read(self, row: int, token: int, k: int) -> TokenLogprobs:
        ids = self._ids[row][:k] if k else []
        best = self._top[row][:k] if k else []
        return TokenLogprobs(token, self._logprob[row], self._rank[row], ids, best)
