"""`Request`: one sequence being generated. Only the `RequestPool` changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from headrace.cache.key import CacheKey
from headrace.cache.manager import CachedSequence, Segment
from headrace.engine.schedule.edits import EditState
from headrace.engine.schedule.mask import TokenMask
from headrace.engine.schedule.plan import TokenLogprobs
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import RequestError

__all__ = ["Request", "RequestUpdate", "Status"]


class Status(Enum):
    """Where a request is. A preempted one lost its blocks (or moved them to the host) and waits again."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True)
class RequestUpdate:
    """One step's result for one request: new output tokens, and `finish_reason` when it was the last.

    `logprobs` belong to `token_ids`; `scores` to prompt tokens, in order from prompt token 1. A beam has
    only `logprobs`: its search chooses the tokens.
    """

    request_id: int
    group_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    """Prompt tokens that were computed before, by another request."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    stop_token: bool = False
    """Whether the last token ended the output, and is no part of its text."""
    drafted: int = 0
    accepted: int = 0
    """Drafts of the step, and how many of them became output tokens."""
    drafts_at: int = 0
    """Place of the first draft in `token_ids`: behind the forced tokens that were known before the step."""


class Request:
    """A prompt, its output so far, and how much of both is computed.

    The n choices of one prompt are n requests with one `group_id`; `parent_id` names the one that computes
    the prompt, from which the others fork. Positions: `token_ids` are known; `num_computed_tokens` of them
    have KV; `num_scheduled` will have it once the plans in flight are done; `num_pending` sampled tokens are
    in flight.
    """

    __slots__ = (
        "accepted_tokens",
        "arrival",
        "cache_key",
        "choice",
        "closing",
        "cumulative_logprob",
        "drafted_tokens",
        "drafting",
        "edits",
        "epoch",
        "finish_reason",
        "forced_apart",
        "forced_tokens",
        "group_id",
        "kv",
        "mask",
        "max_output",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_forced",
        "num_given",
        "num_pending",
        "num_prompt_tokens",
        "num_scored",
        "overtaken",
        "params",
        "parent_id",
        "parked",
        "prefix_waits",
        "priority",
        "request_id",
        "reserve",
        "seed",
        "serial",
        "spec_token_ids",
        "status",
        "stop_ids",
        "stop_reason",
        "token_ids",
        "top",
    )

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int = 0,
        choice: int = 0,
        priority: int = 0,
        parent_id: int | None = None,
        group_id: int | None = None,
        cache_key: CacheKey = CacheKey(),
        output_token_ids: Sequence[int] = (),
        num_scored: int = 0,
    ) -> None:
        """`output_token_ids` and `num_scored` are what another engine has computed of the request."""
        if not prompt_token_ids:
            raise RequestError.about("prompt", "{prompt} has no tokens: there is nothing to continue")
        self.request_id, self.params, self.seed, self.choice = request_id, params, seed, choice
        self.priority, self.parent_id = priority, parent_id
        self.cache_key, self.group_id = cache_key, request_id if group_id is None else group_id
        self.token_ids = [*prompt_token_ids, *output_token_ids]
        self.num_prompt_tokens = len(prompt_token_ids)
        self.spec_token_ids: list[int] = []
        """Drafts behind the known tokens, which a plan in flight computes; kept as far as they are accepted."""
        self.num_computed_tokens = self.num_pending = self.num_cached_tokens = 0
        """The last: prompt tokens that the first admission found computed."""
        scores = params.prompt_logprobs is not None and not choice and not output_token_ids
        self.num_scored = num_scored if scores else len(self.token_ids) - 1
        """Rows before this position have been planned: each scores or samples the token behind it. See `score_end`."""
        self.kv = CachedSequence(cache_key)
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.cumulative_logprob, self.arrival = 0.0, -1
        self.epoch = 0
        """Preemptions so far. An earlier epoch's result still has valid tokens, but its KV is gone."""
        self.parked = False
        """A beam whose search has its log-probabilities and has not chosen its next token."""
        self.overtaken = self.prefix_waits = self.drafted_tokens = self.accepted_tokens = 0
        """Steps in which later ones came first; that it waited for a prefix. Its drafts; those that became output."""
        self.max_output = self.reserve = 0
        """Output tokens after which it ends by length; tokens for which it takes blocks at admission, if it does."""
        self.serial, self.drafting = params.follows_output, False
        """Whether each token must be known before the next is planned; whether it must, as drafts may follow it."""
        self.stop_ids: dict[int, int | None] = {}
        """Token ids that end the request, with the `stop_reason` they give."""
        self.edits: EditState | None = None
        self.mask: TokenMask | None = None
        """What may be sampled next; it has accepted all known tokens."""
        self.num_forced = self.forced_tokens = 0
        """Known tokens behind the last sampled one about which the mask left no choice; all such of the output."""
        self.forced_apart = False
        """Whether each of them is computed in a step of its own."""
        self.closing: str | None = None
        """The finish reason, once the last token is known and some of the forced ones have no score yet."""
        self.num_given = len(output_token_ids)
        """Output tokens in the updates so far. With log-probabilities, forced ones are given when they are scored."""
        asked = [n for n in (params.logprobs, None if choice else params.prompt_logprobs) if n is not None]
        self.top = max(asked, default=None)

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt (a copy)."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far (a copy)."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_tokens(self) -> int:
        """Known tokens."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def score_end(self) -> int:
        """Positions before this have their next token scored, unless they sampled it: the prompt's, or all known.

        Of a slice, the rows with logits are its last ones, so forced tokens are scored where only the prompt was asked.
        """
        if self.mask is not None and self.top is not None:
            return len(self.token_ids) - 1
        return self.num_prompt_tokens - 1

    @property
    def num_scheduled(self) -> int:
        """Tokens with KV once every plan made so far has run."""
        return self.kv.num_tokens

    @property
    def segments(self) -> list[Segment]:
        """Where the KV is: today one local segment."""
        return self.kv.segments

    @property
    def is_beam(self) -> bool:
        """Whether a beam search, not the sampler, chooses the next token."""
        return self.params.beam_width > 0

    def remaining(self) -> int:
        """Known and pending tokens that no plan computes yet: what the next step may be granted.

        0 while the next token must wait for a result: its distribution depends on it, it may be the last, or it comes
        behind drafts.
        """
        known = len(self.token_ids) - self.kv.num_tokens
        if self.num_pending == 0:
            return self.next_span(self.kv.num_tokens)
        if self.spec_token_ids:
            return 0
        if self.serial or self.drafting or known + self.num_pending > 1:
            return max(known, 0)
        if len(self.token_ids) + self.num_pending - self.num_prompt_tokens >= self.max_output:
            return 0
        return known + self.num_pending

    @property
    def num_wanted(self) -> int:
        """Tokens to compute: all known ones, or those up to the last scored row once the output is complete."""
        return max(self.score_end, 1) if self.closing else len(self.token_ids)

    def next_span(self, computed: int) -> int:
        """Known tokens from `computed` on that one step may compute."""
        span = self.num_wanted - computed
        if self.forced_apart and span > 1:
            return min(span, max(span - self.num_forced, 1))
        return span

    def sibling(self, request_id: int, choice: int) -> Request:
        """Another choice of the same prompt, which forks from this request once the prompt is computed."""
        return Request(
            request_id,
            self.prompt_token_ids,
            self.params,
            seed=self.seed,
            choice=choice,
            priority=self.priority,
            parent_id=self.request_id,
            group_id=self.group_id,
            cache_key=self.cache_key,
        )
