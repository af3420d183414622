"""Token ids to text, a token at a time. Text that was returned never changes.

Decoding all ids at once is not the concatenation of decoding each: a character may span tokens, and
sentencepiece drops the space before the first word only. There are three methods; the decoder in tokenizer.json
decides which is used:

    byte-level     every token is some bytes; their concatenation is decoded as UTF-8
    byte fallback  every token is text or one byte; a whole run of bytes is valid UTF-8 or as many U+FFFD
    other          decode a short window twice, with and without the new token, and return the difference
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Detokenizer", "PieceTable", "StopChecker", "StopMatch", "TextStream"]

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 8
"""Prompt tokens that can change the text after them: a character has at most four bytes."""


@dataclass(frozen=True)
class PieceTable:
    """The text of every token id. Built once per tokenizer, shared by its detokenizers.

    `kind` is "bytes", "fallback" or "window" (see the module). `piece(id)` is the token's text before
    decoding, None if there is no such id; `decode(ids)` decodes a list, skipping nothing; `special_ids`
    are the ids that `skip_special_tokens` leaves out; `strip` drops one leading space of the whole text.
    """

    kind: str
    piece: Callable[[int], str | None]
    decode: Callable[[list[int]], str]
    special_ids: frozenset[int]
    strip: bool = False


class _Decoder(Protocol):
    """One way of decoding. `feed` a token and `finish` give final text; `settle` ends the prompt's tokens."""

    def feed(self, token_id: int) -> str: ...
    def finish(self) -> str: ...
    def settle(self) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's bijection between bytes and printable characters, by character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


class _ByteLevel:
    def __init__(self, table: PieceTable) -> None:
        self._piece = table.piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        piece = self._piece(token_id)
        if piece is None:
            return ""
        try:
            raw = bytes([BYTE_OF[character] for character in piece])
        except KeyError:  # an added token with characters outside the alphabet stands for its own text
            raw = piece.encode()
        return self._utf8.decode(raw)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def settle(self) -> None:
        """Keep what the decoder holds: part of a character, which the output may complete."""

    def state(self) -> dict[str, Any]:
        return {"bytes": self._utf8.getstate()[0].hex()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._utf8.setstate((bytes.fromhex(state["bytes"]), 0))


class _ByteFallback:
    def __init__(self, table: PieceTable) -> None:
        self._piece = table.piece
        self._strip = table.strip
        self._run = bytearray()

    def feed(self, token_id: int) -> str:
        piece = self._piece(token_id)
        if piece is None:
            return ""
        byte = _fallback_byte(piece)
        if byte is not None:
            # One wrong byte later would turn the whole run into U+FFFD, so nothing of it is final yet.
            self._run.append(byte)
            return ""
        return self._out(self._close_run() + piece.replace("▁", " "))

    def finish(self) -> str:
        return self._out(self._close_run())

    def _close_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _out(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text[1:] if text[0] == " " else text
        return text

    def state(self) -> dict[str, Any]:
        return {"bytes": self._run.hex(), "strip": self._strip}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._run, self._strip = bytearray.fromhex(state["bytes"]), bool(state["strip"])

    def settle(self) -> None:
        # Complete characters of the run belong to the prompt: later bytes cannot change them.
        self._run = bytearray(_incomplete_tail(bytes(self._run)))
        self._strip = False


def _fallback_byte(piece: str) -> int | None:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


def _incomplete_tail(raw: bytes) -> bytes:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(raw)
    return decoder.getstate()[0]


class _Window:
    """Decodes the ids after the last final text, with the ids of that text before them as context."""

    def __init__(self, table: PieceTable) -> None:
        self._decode = table.decode
        self._ids: list[int] = []
        self._read = 0

    def feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        return self._advance(final=True)

    def settle(self) -> None:
        """Keep the ids as context."""

    def _advance(self, final: bool) -> str:
        before, after = self._decode(self._ids[: self._read]), self._decode(self._ids)
        if len(after) <= len(before) or (after.endswith(REPLACEMENT) and not final):
            return ""
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return after[len(before) :]

    def state(self) -> dict[str, Any]:
        return {"ids": list(self._ids), "read": self._read}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._ids, self._read = list(state["ids"]), int(state["read"])


_KINDS: dict[str, Callable[[PieceTable], _Decoder]] = {
    "bytes": _ByteLevel,
    "fallback": _ByteFallback,
    "window": _Window,
}


class Detokenizer:
    """Incremental decoding of one sequence's generated ids. Its text continues the prompt's.

    The texts given by `push` and at last by `flush` add up to `text`: what decoding prompt and output
    together gives after the prompt's own text. A character that begins in the prompt belongs to the output.
    """

    def __init__(self, table: PieceTable, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> None:
        self._skipped = table.special_ids if skip_special_tokens else frozenset()
        self._decoder = _KINDS[table.kind](table)
        self._texts: list[str] = []
        self._read_prompt(table, prompt_ids)

    def _read_prompt(self, table: PieceTable, prompt_ids: Sequence[int]) -> None:
        visible: list[int] = []
        for token_id in reversed(prompt_ids):
            if token_id not in self._skipped and table.piece(token_id) is not None:
                visible.append(token_id)
                if len(visible) == CONTEXT_TOKENS:
                    break
        for token_id in reversed(visible):
            self._decoder.feed(token_id)
        if visible:
            self._decoder.settle()

    @property
    def text(self) -> str:
        """All text returned so far."""
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    def push(self, ids: Sequence[int]) -> str:
        """Add generated ids; returns the text that is now final, perhaps empty."""
        text = "".join([self._decoder.feed(token_id) for token_id in ids if token_id not in self._skipped])
        if text:
            self._texts.append(text)
        return text

    def flush(self) -> str:
        """End the sequence; returns the text held back, with U+FFFD for an incomplete character."""
        text = self._decoder.finish()
        if text:
            self._texts.append(text)
        return text

    def state(self) -> dict[str, Any]:
        """Plain data from which `restore` continues, here or in another process."""
        return {"text": self.text, **self._decoder.state()}

    def restore(self, state: Mapping[str, Any]) -> Detokenizer:
        """Continue from a `state()`; returns self."""
        self._texts = [state["text"]]
        self._decoder.restore(state)
        return self


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was found: it is `text[start:end]` of the generated text."""

    stop: str
    start: int
    end: int


class StopChecker:
    """Finds stop strings in text that arrives in pieces, and holds back text that may begin one.

    The match is the first one to be complete, character by character, and the longest of those, so it does not
    depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stop)
        self._include = include
        self._held = ""
        self._position = 0
        """Index in the whole text of the first character held."""
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
            return self._release((self.match.end if self._include else self.match.start) - self._position)
        return self._release(len(self._held) - self._open_suffix())

    def flush(self) -> str:
        """End the text; returns what was held back, or nothing after a match."""
        return "" if self.match is not None else self._release(len(self._held))

    def _find(self) -> StopMatch | None:
        begin = max(0, self._search_from - self._position)
        found = []
        for stop in self._stops:
            at = self._held.find(stop, begin)
            if at >= 0:
                found.append((at + len(stop), -len(stop), stop))
        if not found:
            return None
        end, negative_length, stop = min(found)
        return StopMatch(stop, self._position + end + negative_length, self._position + end)

    def _open_suffix(self) -> int:
        """Length of the longest suffix of the held text that begins a stop string."""
        longest = min(
            len(self._held), max(map(len, self._stops)) - 1, self._position + len(self._held) - self._search_from
        )
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._position += count
        return text

    def state(self) -> dict[str, Any]:
        """Plain data from which `restore` continues."""
        return {"held": self._held, "position": self._position, "search_from": self._search_from}

    def restore(self, state: Mapping[str, Any]) -> StopChecker:
        """Continue from a `state()`; returns self."""
        self._held, self._position = state["held"], int(state["position"])
        self._search_from = int(state["search_from"])
        return self


class TextStream:
    """One sequence's output as text: detokenizer, then stop strings.

    `push` goes token by token, so the text, where it stops and how many tokens are kept do not depend on how many
    tokens a step brought. The first `min_tokens` tokens cannot begin a stop string.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._checker = StopChecker(stop, include_stop)
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
            piece = self._detokenizer.push((token_id,))
            if piece:
                out.append(self._checker.push(piece, check=self.num_tokens > self._min_tokens))
        return self._show("".join(out))

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
