"""Which tokens of a slice with drafts stand. A draft is right where it is the token that would have been sampled."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.engine.schedule.plan import SAMPLE, Slice

__all__ = ["accepted", "draft_tokens"]


def draft_tokens(s: Slice) -> list[int]:
    """The drafts at the end of `s.token_ids`: one fewer than its rows that sample."""
    samples = s.targets.count(SAMPLE)
    return s.token_ids[len(s.token_ids) - samples + 1 :] if samples > 1 else []


def accepted(s: Slice, sampled: Sequence[int]) -> int:
    """How many of the `sampled` tokens stand; `sampled` has one for each row of `s` that samples, in order.

    Row i + 1 has seen draft i as its token, so what it samples stands only where draft i is what row i sampled.
    """
    if len(sampled) < 2:
        return len(sampled)
    for count, (draft, token) in enumerate(zip(draft_tokens(s), sampled), 1):
        if draft != token:
            return count
    return len(sampled)
