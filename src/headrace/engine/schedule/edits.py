"""`EditState`: one request's logit edits, kept up to date token by token instead of rebuilt every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from headrace.engine.schedule.plan import LogitEdits
from headrace.engine.schedule.sampling import SamplingParams

__all__ = ["EditState"]


class EditState:
    """Penalties, biases and bans of one request, one entry for each token id concerned.

    A new output token costs O(1). `current` returns the live lists: the runner reads them in `submit`.
    `allowed_token_ids` bans most of the vocabulary, so the runner makes a mask of it instead.
    """

    __slots__ = ("_at", "_banned", "_counts", "_edits", "_params", "_stop_ids")

    def __init__(self, params: SamplingParams, stop_ids: Iterable[int], prompt: Iterable[int]) -> None:
        self._params = params
        self._stop_ids = tuple(sorted(set(stop_ids)))
        self._edits = LogitEdits([], [], [])
        self._at: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._banned = params.min_tokens > 0
        if params.repetition_penalty != 1.0:
            for token in prompt:
                self._edits.divide[self._entry(token)] = params.repetition_penalty
        for token in params.logit_bias:
            self._refresh(token)
        if self._banned:
            for token in self._stop_ids:
                self._refresh(token)

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Whether a request with `params` has any edits at all."""
        return bool(
            params.repetition_penalty != 1.0
            or params.presence_penalty
            or params.frequency_penalty
            or params.logit_bias
            or params.min_tokens
        )

    def append(self, token: int) -> None:
        """Count one more output token."""
        params = self._params
        self._counts[token] = self._counts.get(token, 0) + 1
        if params.repetition_penalty != 1.0:
            self._edits.divide[self._entry(token)] = params.repetition_penalty
        if params.presence_penalty or params.frequency_penalty:
            self._refresh(token)

    def current(self, num_output: int) -> LogitEdits | None:
        """The edits for the token that follows `num_output` output tokens; None where there are none."""
        if self._banned != (num_output < self._params.min_tokens):
            self._banned = not self._banned
            for token in self._stop_ids:
                self._refresh(token)
        return self._edits if self._edits.token_ids else None

    def behind(self, num_output: int, drafts: Sequence[int]) -> list[LogitEdits | None]:
        """The edits for the token behind each draft, if all up to it follow `num_output` output tokens."""
        ahead, rows = self.fork(), []
        for count, token in enumerate(drafts, num_output + 1):
            ahead.append(token)
            edits = ahead.current(count)
            rows.append(None if edits is None else edits.copy())
        return rows

    def after(self, num_output: int, drafts: Sequence[int]) -> LogitEdits | None:
        """The edits for the token behind all of these drafts, which follow `num_output` output tokens."""
        ahead = self.fork()
        for token in drafts:
            ahead.append(token)
        return ahead.current(num_output + len(drafts))

    def fork(self) -> EditState:
        """An independent copy."""
        twin = EditState.__new__(EditState)
        twin._params, twin._stop_ids, twin._banned = self._params, self._stop_ids, self._banned
        twin._edits, twin._at, twin._counts = self._edits.copy(), dict(self._at), dict(self._counts)
        return twin

    def _entry(self, token: int) -> int:
        at = self._at.get(token)
        if at is None:
            at = self._at[token] = len(self._edits.token_ids)
            self._edits.token_ids.append(token)
            self._edits.divide.append(1.0)
            self._edits.add.append(0.0)
        return at

    def _refresh(self, token: int) -> None:
        params = self._params
        count = self._counts.get(token, 0)
        add = params.logit_bias.get(token, 0.0) - params.frequency_penalty * count
        if count:
            add -= params.presence_penalty
        if self._banned and token in self._stop_ids:
            add = -math.inf
        self._edits.add[self._entry(token)] = add
