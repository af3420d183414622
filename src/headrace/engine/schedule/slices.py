"""From a request and a number of tokens to the `Slice` that computes them."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.engine.schedule.plan import PREVIOUS, SAMPLE, LogitEdits, Slice
from headrace.engine.schedule.request import Request

__all__ = ["add_drafts", "make_slice"]

_ONE_SAMPLE = [SAMPLE]
"""Shared by all decode slices: runners only read targets."""


def make_slice(request: Request, start: int, end: int, samples: int, edits: list[LogitEdits | None]) -> Slice:
    """The slice for positions [start, end) of `request`; its blocks are allocated.

    With `samples` 1 the last row is sampled. Rows of the prompt that `prompt_logprobs` has not scored yet are scored,
    and those before forced tokens. The block table and the edits are live lists: runners read them in `submit`.
    """
    tokens = request.token_ids
    known = len(tokens)
    ids = tokens[start:end] if end <= known else [*tokens[start:known], PREVIOUS]
    targets = _ONE_SAMPLE
    last_scored = request.score_end
    if request.num_scored < last_scored:
        first, stop = max(start, request.num_scored), min(end, last_scored)
        targets = tokens[first + 1 : stop + 1] + [SAMPLE] * samples
    elif samples != 1:
        targets = [SAMPLE] * samples
    return Slice(
        request.request_id,
        start,
        ids,
        request.kv.blocks,
        targets,
        request.params,
        request.seed,
        request.choice,
        edits,
        request.mask if samples else None,
        request.top,
    )


def add_drafts(s: Slice, drafts: Sequence[int], edits: Sequence[LogitEdits | None]) -> None:
    """Append drafts to a slice whose last row samples. Each draft adds a row that samples."""
    s.token_ids = [*s.token_ids, *drafts]
    s.targets = [*s.targets, *[SAMPLE] * len(drafts)]
    s.edits = [*s.edits, *edits]
