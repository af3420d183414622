"""`GrammarMask`: the engine's `TokenMask` over llguidance's matchers.

constraint ──> matcher ─┐
bad words ───> matcher ─┼─ AND ──> the tokens that may come next, and those that must
allowed ids ────────────┘
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from llguidance import LLMatcher

from headrace.engine.run.words import clear_ids, set_ids

__all__ = ["GrammarMask"]


class GrammarMask:
    """The state of one output. Of `stop_ids`, one may come where every matcher accepts the text so far as a whole.

    A special token in the output (a marker of a tool call) is no text: bad words do not see it.
    """

    def __init__(
        self,
        constraint: LLMatcher | None,
        bad_words: LLMatcher | None,
        special_ids: Collection[int],
        eos_id: int,
        stop_ids: Collection[int],
        allowed: np.ndarray | None,
        min_tokens: int,
    ) -> None:
        """`allowed` are the words of `allowed_token_ids` (uint32 [W]), None for all. The matchers become its own."""
        self._eos_id = eos_id
        self._constraint = constraint
        self._bad_words = bad_words
        self._special_ids = special_ids
        self._stop_ids = stop_ids
        self._allowed = allowed
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._failed: str | None = None

    @property
    def ended(self) -> bool:
        """See `TokenMask`."""
        constraint = self._constraint
        return constraint is not None and self._failed is None and constraint.is_stopped()

    @property
    def failed(self) -> str | None:
        """See `TokenMask`."""
        return self._failed

    def fill(self, words_W: np.ndarray) -> None:
        """See `TokenMask`."""
        if self._failed is None:
            self._fill(words_W)
        if self._failed is None and not words_W.any():
            self._fail("nothing may follow this output: no token is allowed by all of its fields at once")
        if self._failed is not None:
            words_W[:] = 0xFFFFFFFF

    def accept(self, tokens: Sequence[int]) -> None:
        """See `TokenMask`."""
        for token in tokens:
            if self._failed is not None:
                return
            self._tokens.append(token)
            for matcher in self._readers(token):
                if not matcher.consume_token(token):
                    self._fail(f"token {token} is not allowed here: {_reason(matcher)}")
                    return
        if self.ended and len(self._tokens) < self._min_tokens:
            self._fail(f"the text is complete after {len(self._tokens)} tokens, fewer than min_tokens")

    def forced(self) -> list[int]:
        """See `TokenMask`."""
        if self._constraint is None or self._failed is not None or self._constraint.is_stopped():
            return []
        run = self._constraint.compute_ff_tokens()
        if self._bad_words is not None:
            # A special token is no text, so it ends what can be checked at once.
            text = next((i for i, token in enumerate(run) if token in self._special_ids), len(run))
            run = run[: self._bad_words.validate_tokens(run[:text])]
        for i, token in enumerate(run):
            if token in self._stop_ids or not self._is_allowed(token):
                return run[:i]
        return run

    def allows(self, tokens: Sequence[int]) -> int:
        """See `TokenMask`."""
        if self._failed is not None or not tokens:
            return 0
        if tokens[0] in self._stop_ids:
            may_end = len(self._tokens) >= self._min_tokens and all(m.is_accepting() for m in self._matchers)
            return int(may_end and self._is_allowed(tokens[0]))
        ends = self._stop_ids if self._constraint is None else {*self._stop_ids, self._eos_id}
        banned = (i for i, token in enumerate(tokens) if token in ends or not self._is_allowed(token))
        tokens = tokens[: next(banned, len(tokens))]
        if self._constraint is not None:
            if self._constraint.is_stopped():
                return 0
            tokens = tokens[: self._constraint.validate_tokens(list(tokens))]
            pairs = enumerate(zip(self._constraint.compute_ff_tokens(), tokens))
            tokens = tokens[: next((i for i, (must, token) in pairs if must != token), len(tokens))]
        if self._bad_words is not None:
            text = next((i for i, token in enumerate(tokens) if token in self._special_ids), len(tokens))
            if text or not tokens:
                return self._bad_words.validate_tokens(list(tokens[:text]))
            return 1  # a special token is no text, and what follows it cannot be checked at once
        return len(tokens)

    def fork(self) -> GrammarMask:
        """See `TokenMask`."""
        twin = GrammarMask(
            None if self._constraint is None else self._constraint.deep_copy(),
            None if self._bad_words is None else self._bad_words.deep_copy(),
            self._special_ids,
            self._eos_id,
            self._stop_ids,
            self._allowed,
            self._min_tokens,
        )
        twin._tokens, twin._failed = list(self._tokens), self._failed
        return twin

    @property
    def _matchers(self) -> list[LLMatcher]:
        return [matcher for matcher in (self._constraint, self._bad_words) if matcher is not None]

    def _readers(self, token: int) -> list[LLMatcher]:
        """The matchers that read a token as a part of the text."""
        return [m for m in self._matchers if m is self._constraint or token not in self._special_ids]

    def _fill(self, words_W: np.ndarray) -> None:
        """The AND of all masks, with the tokens that may end the output."""
        words_W[:] = 0xFFFFFFFF
        ends = len(self._tokens) >= self._min_tokens
        for i, matcher in enumerate(self._matchers):
            row_W = words_W if i == 0 else np.empty_like(words_W)
            matcher.unsafe_compute_mask_ptr(row_W.ctypes.data, row_W.nbytes)
            if matcher.is_error():
                self._fail(_reason(matcher))
                return
            ends = ends and matcher.is_accepting()
            if matcher is self._bad_words:
                set_ids(row_W, self._special_ids)
            if i:
                words_W &= row_W
        if self._constraint is not None:
            clear_ids(words_W, (self._eos_id,))
        (set_ids if ends else clear_ids)(words_W, self._stop_ids)
        if self._allowed is not None:
            words_W &= self._allowed

    def _is_allowed(self, token: int) -> bool:
        return self._allowed is None or bool(self._allowed[token >> 5] >> (token & 31) & 1)

    def _fail(self, why: str) -> None:
        if self._failed is None:
            names = (
                ("constraint", self._constraint),
                ("bad_words", self._bad_words),
                ("allowed_token_ids", self._allowed),
            )
            fields = [name for name, part in names if part is not None] + ["min_tokens"] * (self._min_tokens > 0)
            self._failed = f"{', '.join(fields)}: {why}"


def _reason(matcher: LLMatcher) -> str:
    return matcher.get_error().partition("\n")[0]
