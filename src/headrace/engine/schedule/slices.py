"""From a request and a number of tokens to the `Slice` that computes them."""

from __future__ import annotations

from headrace.engine.schedule.plan import PREVIOUS, SAMPLE, LogitEdits, Slice
from headrace.engine.schedule.request import Request

__all__ = ["make_slice"]

_ONE_SAMPLE = [SAMPLE]
"""Shared by all decode slices: runners only read targets."""


def make_slice(request: Request, start: int, end: int, samples: int, edits: LogitEdits | None) -> Slice:
    """The slice for positions [start, end) of `request`; its blocks are allocated.

    The last `samples` rows, from the last known token on, are sampled: several where there are drafts. Rows of
    the prompt that `prompt_logprobs` has not scored yet are scored, and those before forced tokens. The block table
    is the live list: runners read it in `submit`.
    """
    tokens = request.token_ids
    known = len(tokens)
    if end <= known:
        ids = tokens[start:end]
    elif request.num_pending:
        ids = [*tokens[start:known], PREVIOUS]
    else:
        ids = [*tokens[start:known], *request.spec_token_ids[: end - known]]
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
