"""Log-probabilities in answers: the tokens of a choice, each with its place in the text that is returned."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from headrace.llm.outputs import CompletionOutput, Logprob
from headrace.text.detokenizer import Detokenizer
from headrace.text.places import TokenPlace
from headrace.text.tokenizer import Tokenizer

__all__ = ["PlacedToken", "TokenQueue", "TokenShapes"]


class PlacedToken(NamedTuple):
    """A token with its log-probability, the best ones beside it, and its place in the returned text."""

    table: Mapping[int, Logprob]
    """Itself first. The first token of a prompt has rank 0: it is not predicted."""
    place: TokenPlace

    @property
    def token_id(self) -> int:
        """Its own id."""
        return next(iter(self.table))


class TokenQueue:
    """The tokens of one choice that wait for their text: a stop string may yet take it back."""

    def __init__(self, detokenizer: Detokenizer, echoed: str, prompt: Iterable[PlacedToken]) -> None:
        """`echoed` is the prompt's text in the answer, with the `prompt`'s tokens; `detokenizer` is of what follows."""
        self._detokenizer = detokenizer
        self._begin = len(echoed)
        self._length = 0
        """Characters returned."""
        self._waiting = deque(prompt)

    def take(self, part: CompletionOutput) -> list[PlacedToken]:
        """Add the choice's next part; returns the tokens to send with its text, at the end all of them."""
        self._length += len(part.text)
        for token_id, table in zip(part.token_ids, part.logprobs or ()):
            offset, opens = self._detokenizer.place(token_id)
            self._detokenizer.push((token_id,))
            self._waiting.append(PlacedToken(table, TokenPlace(self._begin + offset, opens)))
        ready = []
        while self._waiting and (part.finish_reason or self._waiting[0].place.offset <= self._length):
            token = self._waiting.popleft()
            place = token.place._replace(offset=min(token.place.offset, self._length))
            ready.append(token._replace(place=place))
        return ready


class TokenShapes:
    """How the tokens of one request are written."""

    def __init__(self, tokenizer: Tokenizer, best: int, as_ids: bool) -> None:
        """`best` alternatives are shown for each token; `as_ids` writes "token_id:5" in place of its text."""
        self._tokenizer = tokenizer
        self._best = best
        self._as_ids = as_ids
        self._bytes: dict[tuple[int, bool], list[int]] = {}

    def of_completion(self, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        """The `logprobs` of a choice of /v1/completions."""
        shape: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for table, (offset, opens) in tokens:
            own_id, own = next(iter(table.items()))
            shape["tokens"].append(self._text(own_id, own, opens))
            shape["text_offset"].append(offset)
            shape["token_logprobs"].append(own.logprob if own.rank else None)
            best: dict[str, float] = {}
            for token_id, entry in table.items():
                if token_id != own_id and entry.rank > self._best:
                    continue
                # Two tokens may have the same text: keep the likelier.
                text = self._text(token_id, entry, opens)
                best[text] = max(entry.logprob, best.get(text, entry.logprob))
            shape["top_logprobs"].append(best if own.rank else None)
        return shape

    def of_chat(self, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        """The `logprobs` of a choice of /v1/chat/completions."""
        content = []
        for table, (_, opens) in tokens:
            [own, *_] = entries = list(table.items())
            top = sorted((e for e in entries if e[1].rank <= self._best), key=lambda e: e[1].rank)
            content.append({**self._entry(*own, opens), "top_logprobs": [self._entry(*e, opens) for e in top]})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, entry: Logprob, opens: bool) -> dict[str, Any]:
        key = token_id, opens
        if key not in self._bytes:
            self._bytes[key] = list(self._tokenizer.token_bytes(token_id, opens))
        return {"token": self._text(token_id, entry, opens), "logprob": entry.logprob, "bytes": self._bytes[key]}

    def _text(self, token_id: int, entry: Logprob, opens: bool) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id, opens=True) if opens else entry.decoded_token
