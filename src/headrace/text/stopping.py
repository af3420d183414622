"""Stop strings: found in text that arrives in pieces, special tokens among them.

token ids ──> Detokenizer ──> StopChecker, which holds back what may begin a stop string ──> text to show
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.text.detokenizer import Detokenizer

__all__ = ["StopChecker", "StopMatch", "TextStream"]

FIRST_SYMBOL = 0xD800
"""The first surrogate: no decoded text contains one."""


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was found: it is `text[start:end]` of the text that was pushed."""

    stop: str
    start: int
    end: int


class StopChecker:
    """Finds stop strings in text that arrives in pieces, and holds back text that may begin one.

    The match is the first one to be complete, character by character, and the longest of those, so it does not
    depend on how the text was cut into pieces.

    A token that is left out of the text may be part of a stop string too. `push` takes it as one character of
    `symbols`, which is never returned.
    """

    def __init__(self, stop: Sequence[str], include: bool = False, symbols: Mapping[str, str] = {}) -> None:
        """`symbols` maps the text of each token that is left out to its character."""
        self._stops = [(text, form) for text in stop for form in dict.fromkeys((text, _encoded(text, symbols)))]
        self._longest = max((len(form) for _, form in self._stops), default=0)
        self._symbols = frozenset(symbols.values())
        self._remove = str.maketrans("", "", "".join(self._symbols))
        self._include = include
        self._held = ""
        self._position = 0
        """Index in everything pushed of the first character held."""
        self._search_from = 0
        self.match: StopMatch | None = None

    def push(self, text: str, check: bool = True) -> str:
        """Add text; returns what may be shown. With `check=False` no match may begin in this text."""
        if self.match is not None:
            return ""
        if not self._stops:
            self._position += len(text)
            return text
        self._held += text
        if not check:
            self._search_from = self._position + len(self._held)
            return self._release(len(self._held))
        self.match = self._find()
        if self.match is not None:
            shown = self._release(self.match.start - self._position)
            return shown + self.match.stop if self._include else shown
        return self._release(len(self._held) - self._open_suffix())

    def flush(self) -> str:
        """End the text; returns what was held back, or nothing after a match."""
        return "" if self.match is not None else self._release(len(self._held))

    def _find(self) -> StopMatch | None:
        begin = max(0, self._search_from - self._position)
        everything = visible = list(enumerate(self._held))[begin:]
        if self._symbols:
            visible = [(i, character) for i, character in everything if character not in self._symbols]
        texts = "".join(c for _, c in everything), "".join(c for _, c in visible)
        found = []
        for stop, form in self._stops:
            # A stop string without symbols is one of the text that is shown, whatever was left out between.
            text, places = (texts[0], everything) if self._has_symbol(form) else (texts[1], visible)
            at = text.find(form)
            if at >= 0:
                found.append((places[at + len(form) - 1][0] + 1, places[at][0], stop))
        if not found:
            return None
        end, start, stop = min(found)
        return StopMatch(stop, self._position + start, self._position + end)

    def _open_suffix(self) -> int:
        """Length of the longest suffix of the held text that begins a stop string."""
        most = self._longest - 1 + (sum(c in self._symbols for c in self._held) if self._symbols else 0)
        longest = min(len(self._held), most, self._position + len(self._held) - self._search_from)
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            shown = tail.translate(self._remove) if self._symbols else tail
            for _, form in self._stops:
                begun = tail if self._has_symbol(form) else shown
                if begun and form.startswith(begun):
                    return length
        return 0

    def _has_symbol(self, form: str) -> bool:
        return bool(self._symbols) and not self._symbols.isdisjoint(form)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._position += count
        return text.translate(self._remove) if self._symbols else text

    def state(self) -> dict[str, Any]:
        """Plain data from which `restore` continues."""
        return {"held": self._held, "position": self._position, "search_from": self._search_from}

    def restore(self, state: Mapping[str, Any]) -> StopChecker:
        """Continue from a `state()`; returns self."""
        self._held, self._position = state["held"], int(state["position"])
        self._search_from = int(state["search_from"])
        return self


def _encoded(text: str, symbols: Mapping[str, str]) -> str:
    """The text with each hidden token in it as its character, the longest first as tokenizers do."""
    for hidden in sorted(symbols, key=len, reverse=True):
        text = text.replace(hidden, symbols[hidden])
    return text


class TextStream:
    """One sequence's output as text: detokenizer, then stop strings.

    `push` goes token by token, so the text, where it stops and how many tokens are kept do not depend on how many
    tokens a step brought. The first `min_tokens` tokens cannot begin a stop string. A special token that a stop string
    names is found whether or not it is shown.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        hidden = detokenizer.skipped_tokens() if stop else {}
        named = [token for token, text in hidden.items() if any(text in one for one in stop)]
        self._symbols = {token: chr(FIRST_SYMBOL + i) for i, token in enumerate(named)}
        symbols = {hidden[token]: symbol for token, symbol in self._symbols.items()}
        self._checker = StopChecker(stop, include_stop, symbols)
        self._min_tokens = min_tokens
        self._shown: list[str] = []
        self.num_tokens = 0
        """Tokens used: all that were pushed, or those up to the one that completed the stop string, included."""

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._checker.match.stop if self._checker.match else None

    @property
    def text(self) -> str:
        """All text returned so far."""
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def push(self, ids: Sequence[int]) -> str:
        """Add generated ids; returns the text to show now. After a stop string, further ids are ignored."""
        out = []
        for token_id in ids:
            if self._checker.match is not None:
                break
            self.num_tokens += 1
            piece = self._read(token_id)
            if piece:
                out.append(self._checker.push(piece, check=self.num_tokens > self._min_tokens))
        return self._show("".join(out))

    def names(self, token_id: int) -> bool:
        """Whether a stop string contains this token, which is left out of the text."""
        return token_id in self._symbols

    def _read(self, token_id: int) -> str:
        symbol = self._symbols.get(token_id)
        if symbol is None:
            return self._detokenizer.push((token_id,))
        # As if the token were shown, it ends an incomplete character: the text before it stands before it.
        return self._detokenizer.flush() + symbol

    def finish(self) -> str:
        """End the sequence; returns the last text to show. A stop string may be found in it."""
        if self._checker.match is not None:
            return ""
        text = self._checker.push(self._detokenizer.flush(), check=self.num_tokens > self._min_tokens)
        return self._show(text + self._checker.flush())

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text

    def state(self) -> dict[str, Any]:
        """Plain data from which `restore` continues."""
        return {
            "num_tokens": self.num_tokens,
            "shown": self.text,
            "detokenizer": self._detokenizer.state(),
            "checker": self._checker.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> TextStream:
        """Continue from a `state()`; returns self."""
        self.num_tokens, self._shown = int(state["num_tokens"]), [state["shown"]]
        self._detokenizer.restore(state["detokenizer"])
        self._checker.restore(state["checker"])
        return self
