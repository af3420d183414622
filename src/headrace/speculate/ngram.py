"""`NgramProposer`: what followed the last tokens where they occurred before, in the prompt or the output.

    known tokens   … the cat sat on the mat and the cat sat |
    last n-gram                                the cat sat
    earlier one        the cat sat
    draft                          on the mat …

This is prompt lookup (vLLM's `ngram`): it needs no model, and it helps where output repeats its prompt or itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.engine.schedule.request import Request
from headrace.speculate.base import Proposal

__all__ = ["NgramProposer"]

SHORTEST = 2
"""One token occurs by chance in almost every text, so what followed it says little."""
LONGEST = 5
"""Longer n-grams rarely choose another place, and each length costs a table entry for every token."""
MATCH_BOUND = 32
"""Matches are measured up to here; a longer one is no better a sign, and measuring it takes time."""
BACKLOG = 512
"""Prompt tokens indexed in one call, about 0.4 ms, so that a long prompt does not hold up the step."""


class _Index:
    """Where the n-grams of one request's tokens end.

    `tokens[low:high]` are indexed: each n-gram inside that range with a token behind it. `ends` maps an n-gram's hash
    to the end of its last occurrence. A hash takes less memory than the tokens, and lookups compare the tokens anyway.
    """

    __slots__ = ("ends", "high", "low")

    def __init__(self, known: int) -> None:
        self.ends: dict[int, int] = {}
        self.low = self.high = max(known - 1, 0)

    def forward(self, tokens: Sequence[int]) -> None:
        """Index the n-grams that got a token behind them since the last call."""
        ends = self.ends
        for end in range(self.high + 1, len(tokens)):
            for size in range(SHORTEST, min(LONGEST, end - self.low) + 1):
                ends[hash(tuple(tokens[end - size : end]))] = end
        self.high = max(len(tokens) - 1, self.high)

    def backward(self, tokens: Sequence[int]) -> None:
        """Index `BACKLOG` more tokens before those indexed. Occurrences that are indexed come later, so they stay."""
        low = max(self.low - BACKLOG, 0)
        ends = self.ends
        stop = min(self.low + LONGEST - 1, self.high)
        part = tokens[low:stop]
        for size in range(SHORTEST, LONGEST + 1):
            # N-grams that start before self.low: the others are indexed.
            count = max(min(self.low - low, len(part) - size + 1), 0)
            grams = zip(*(part[i : i + count] for i in range(size)))
            earlier = dict(zip(map(hash, grams), range(low + size, low + size + count)))
            for gram, end in earlier.items():
                ends.setdefault(gram, end)
        self.low = low


class NgramProposer:
    """Looks up the longest n-gram, of `LONGEST` to `SHORTEST` tokens, that ends the known tokens and occurred before.

    The draft follows its last occurrence. Where the draft reaches the end of the known tokens it goes on with itself,
    so a text that repeats with a short period is drafted at any length. A prompt longer than `BACKLOG` is indexed from
    its end, a part in each call; once that is done, a proposal depends on the request's tokens alone.
    """

    name = "ngram"

    def __init__(self) -> None:
        self._indexes: dict[int, _Index] = {}

    def __len__(self) -> int:
        """Requests that something is kept for."""
        return len(self._indexes)

    def wants(self, request: Request) -> bool:
        """See `Proposer`."""
        return True

    def propose(self, request: Request, most: int) -> Proposal:
        """See `Proposer`. `match` is the length of the match, extended backwards up to `MATCH_BOUND`."""
        index = self._follow(request)
        tokens, ends = request.token_ids, index.ends
        known = len(tokens)
        if most <= 0:
            return Proposal([])
        for size in range(min(LONGEST, known - 1), SHORTEST - 1, -1):
            gram = tokens[known - size :]
            end = ends.get(hash(tuple(gram)))
            if end is None or tokens[end - size : end] != gram:
                continue
            match = size
            bound = min(MATCH_BOUND, end)
            while match < bound and tokens[end - 1 - match] == tokens[known - 1 - match]:
                match += 1
            draft = tokens[end : end + most]
            period = known - end
            while len(draft) < most:
                draft.append(draft[-period])
            return Proposal(draft, match)
        return Proposal([])

    def learn(self, request: Request) -> None:
        """See `Proposer`."""
        new = request.request_id not in self._indexes
        index = self._follow(request)
        if index.low and not new:
            index.backward(request.token_ids)

    def finish(self, request: Request) -> None:
        """See `Proposer`."""
        self._indexes.pop(request.request_id, None)

    def _follow(self, request: Request) -> _Index:
        """The request's index, up to its last token. It is made anew where tokens were cut off."""
        index = self._indexes.get(request.request_id)
        tokens = request.token_ids
        if index is None or len(tokens) <= index.high:
            index = self._indexes[request.request_id] = _Index(len(tokens))
            index.backward(tokens)
        if len(tokens) > index.high + 1:
            index.forward(tokens)
        return index
