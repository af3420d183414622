"""The data that scheduler and runner exchange: plain numbers, no tensors.

A step grants each request some of the difference between its *known* tokens and its *computed* ones. A `Slice` is
one such grant; chunked prefill, decode, a resumed request and a cached prefix all look the same here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.engine.schedule.mask import TokenMask
from headrace.engine.schedule.sampling import SamplingParams

__all__ = ["PREVIOUS", "SAMPLE", "LogitEdits", "Plan", "Slice", "SliceResult", "StepResult", "TokenLogprobs"]

PREVIOUS = -1
"""In `Slice.token_ids`: the token sampled for this request by the plan before, which is not known on the host yet."""

SAMPLE = -1
"""In `Slice.targets`: sample here, instead of scoring a known token."""


@dataclass(slots=True)
class LogitEdits:
    """Sparse edits of one request's next distribution, from its history: z ← (z/divide or z·divide) + add."""

    token_ids: list[int]
    divide: list[float]
    add: list[float]

    def copy(self) -> LogitEdits:
        """The same edits in lists of their own."""
        return LogitEdits(list(self.token_ids), list(self.divide), list(self.add))


@dataclass(slots=True)
class Slice:
    """One request's part of a step: `token_ids` at positions start, start+1, … whose KV is to be computed.

    `block_table` covers positions [0, start + len(token_ids)). The last `len(targets)` rows get logits: a target
    ≥ 0 scores that known token (prompt log-probabilities), `SAMPLE` draws the token at the row's position + 1.
    A slice in the middle of a prompt has no targets; one that ends in γ drafts samples γ + 1 rows.
    """

    request_id: int
    start: int
    token_ids: list[int]
    block_table: list[int]
    targets: list[int]
    params: SamplingParams
    seed: int
    choice: int
    edits: list[LogitEdits | None] = field(default_factory=list)
    """One for each row that samples; none at all where the request has no edits."""
    mask: TokenMask | None = None
    """What the first of these rows may sample; it accounts for `params.allowed_token_ids` too."""
    top: int | None = None
    """How many best tokens to report beside each sampled or scored one; None for no log-probabilities at all."""

    @property
    def samples(self) -> int:
        """Rows that sample."""
        return self.targets.count(SAMPLE)

    @property
    def drafts(self) -> list[int]:
        """The drafts: the last tokens, one fewer than the rows that sample."""
        count = self.samples - 1
        return self.token_ids[len(self.token_ids) - count :] if count > 0 else []


@dataclass(slots=True)
class Plan:
    """One step. The runner does swap_out, swap_in and copies, in this order, before it computes the slices."""

    step: int
    slices: list[Slice] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    """(block, host slot)"""
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    """(host slot, block)"""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source block, target block): copy-on-write"""
    preempted: list[int] = field(default_factory=list)
    """Requests that lost their blocks in this step."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(len(s.token_ids) for s in self.slices)


@dataclass(slots=True)
class TokenLogprobs:
    """The raw log-probability and rank of one token, and the best ones beside it."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class SliceResult:
    """A slice's result: a token for each row that samples and, where asked, log-probabilities of all rows.

    Behind drafts, a row's token counts only where the drafts before it are what was sampled; the scheduler decides.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class StepResult:
    """The results of a plan, by request id."""

    step: int
    slices: dict[int, SliceResult] = field(default_factory=dict)
