"""`PredictionProposer`: drafts from the text that the caller expects, OpenAI's `prediction`.

    prediction   def area(w, h): return w * h
    output       def area(width, h): return |        "width" differs; behind it the output is found again
    draft                                     w * h

An edit of a file repeats most of it, so most of its tokens come from the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.engine.schedule.request import Request
from headrace.speculate.base import Proposal

__all__ = ["PredictionProposer"]

NEAR = 2
"""Output tokens that must agree to continue close behind the difference, where a chance hit is unlikely."""
WINDOW = 64
"""Tokens behind the difference that count as close: a few lines of code."""
FAR = 4
"""Output tokens that must agree to continue anywhere else: shorter texts occur in many places."""
MATCH_BOUND = 32
"""Matches are measured up to here; a longer one is no better a sign."""
CHARACTERS = 0x110000
"""Values of a character of a Python string."""


def _text(token_ids: Sequence[int]) -> str:
    """One character for each token, because `str.find` searches thousands of them in microseconds.

    Ids above all characters share characters. A false hit costs a rejected draft, no more.
    """
    return "".join([chr(token % CHARACTERS) for token in token_ids])


class _Place:
    """Where one request's output is in its prediction.

    `at` is the index of the predicted token that comes next. `home` is how far the two certainly agreed: a search for
    the output starts there. `match` is the number of output tokens that agree with those before `at`.
    """

    __slots__ = ("at", "home", "match", "seen", "text", "token_ids")

    def __init__(self, token_ids: Sequence[int], seen: int) -> None:
        self.token_ids = token_ids
        self.text = _text(token_ids)
        self.at = self.home = self.match = 0
        self.seen = seen
        """Known tokens that it has followed; the output starts behind the prompt."""

    def follow(self, tokens: Sequence[int], start: int) -> None:
        """Go on to the end of the known `tokens`, whose output begins at `start`."""
        predicted = self.token_ids
        for seen in range(self.seen, len(tokens)):
            if self.at < len(predicted) and predicted[self.at] == tokens[seen]:
                self.match += 1
                if self.match >= FAR or self.at == self.home:
                    self.home = self.at + 1
            else:
                self.match = 0
            self.at += 1  # where they differ, the most likely edit replaces one token by one
            if not self.match:
                self._search(tokens[max(start, seen + 1 - FAR) : seen + 1])
        self.seen = len(tokens)

    def _search(self, last: Sequence[int]) -> None:
        """Look for the `last` output tokens close behind `home`, then anywhere behind it, then anywhere before it."""
        text, home = self.text, self.home
        if len(last) < NEAR:
            return
        for size in range(len(last), NEAR - 1, -1):
            found = text.find(_text(last[-size:]), home, home + WINDOW)
            if found >= 0:
                break
        else:
            size = FAR
            wanted = _text(last)
            if len(last) < FAR:
                return
            found = text.find(wanted, home)
            if found < 0:
                found = text.rfind(wanted, 0, home)
            if found < 0:
                return
        self.at, self.match = found + size, size
        if size >= FAR:
            self.home = self.at


class PredictionProposer:
    """Follows `request.params.prediction` while the output agrees with it, and finds the place again where it differs.

    Behind a difference it first goes on as if one token had been replaced, with `match` 0, and proposes nothing behind
    a second one. Once the last `NEAR` output tokens occur close behind the difference, or the last `FAR` anywhere, it
    goes on from there.
    """

    name = "prediction"

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}

    def __len__(self) -> int:
        """Requests that something is kept for."""
        return len(self._places)

    def wants(self, request: Request) -> bool:
        """See `Proposer`."""
        return bool(request.params.prediction)

    def propose(self, request: Request, most: int) -> Proposal:
        """See `Proposer`. `match` is the number of tokens that agree before the draft, up to `MATCH_BOUND`."""
        place = self._follow(request)
        if place is None:
            return Proposal([])
        sure = place.match > 0 or place.at <= place.home + 1
        draft = list(place.token_ids[place.at : place.at + max(most, 0)]) if sure else []
        return Proposal(draft, min(place.match, MATCH_BOUND) if draft else 0)

    def learn(self, request: Request) -> None:
        """See `Proposer`."""
        self._follow(request)

    def finish(self, request: Request) -> None:
        """See `Proposer`."""
        self._places.pop(request.request_id, None)

    def _follow(self, request: Request) -> _Place | None:
        """The place of a request that has a prediction. It is found anew where tokens were cut off."""
        prediction = request.params.prediction
        if not prediction:
            return None
        place = self._places.get(request.request_id)
        tokens, start = request.token_ids, request.num_prompt_tokens
        if place is None or len(tokens) < place.seen:
            place = self._places[request.request_id] = _Place(prediction, start)
        if len(tokens) > place.seen:
            place.follow(tokens, start)
        return place
