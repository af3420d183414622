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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Detokenizer", "PieceTable", "piece_bytes"]

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
    """One way of decoding. `feed` a token and `finish` give final text; `settle` ends the prompt's tokens, and
    gives the text of its complete characters.

    `gap` is the number of characters between the final text and the one in which a next token would begin.
    """

    def feed(self, token_id: int) -> str: ...
    def gap(self, token_id: int) -> int: ...
    def finish(self) -> str: ...
    def settle(self) -> str: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's bijection between bytes and printable characters, by character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


def piece_bytes(table: PieceTable, token_id: int) -> bytes:
    """The bytes that a token stands for in the middle of a text; none if there is no such id."""
    piece = table.piece(token_id)
    if piece is None:
        return b""
    if table.kind == "bytes":
        return _alphabet_bytes(piece)
    byte = _fallback_byte(piece)
    if table.kind == "fallback":
        return piece.replace("▁", " ").encode() if byte is None else bytes([byte])
    once, twice = table.decode([token_id]), table.decode([token_id, token_id])
    added = twice[len(once) :]  # what a token adds after another: a first space too
    if REPLACEMENT not in added:
        return added.encode()
    return _alphabet_bytes(piece) if byte is None else bytes([byte])


def _alphabet_bytes(piece: str) -> bytes:
    try:
        return bytes([BYTE_OF[character] for character in piece])
    except KeyError:  # an added token with characters outside the alphabet stands for its own text
        return piece.encode()


def _characters_before(known: bytes, token: bytes) -> int:
    """Characters of `known` + `token` as UTF-8 before the one in which the token begins."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    count = len(decoder.decode(known)) + len(decoder.decode(token[:1]))
    return count - (not decoder.getstate()[0])


class _ByteLevel:
    def __init__(self, table: PieceTable) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(piece_bytes(self._table, token_id))

    def gap(self, token_id: int) -> int:
        raw = piece_bytes(self._table, token_id)
        return _characters_before(self._utf8.getstate()[0], raw) if raw else 0

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def settle(self) -> str:
        """Keep what the decoder holds: part of a character, which the output may complete."""
        return ""

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

    def gap(self, token_id: int) -> int:
        byte = _fallback_byte(self._piece(token_id) or "")
        if byte is None:
            count = len(_decoded_run(self._run))
        else:
            count = _characters_before(bytes(self._run), bytes([byte]))
        return max(0, count - (self._strip and self._run[:1] == b" "))

    def finish(self) -> str:
        return self._out(self._close_run())

    def _close_run(self) -> str:
        run, self._run = self._run, bytearray()
        return _decoded_run(run)

    def _out(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text[1:] if text[0] == " " else text
        return text

    def state(self) -> dict[str, Any]:
        return {"bytes": self._run.hex(), "strip": self._strip}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._run, self._strip = bytearray.fromhex(state["bytes"]), bool(state["strip"])

    def settle(self) -> str:
        # Complete characters of the run belong to the prompt: later bytes cannot change them.
        tail = _incomplete_tail(bytes(self._run))
        whole = self._run[: len(self._run) - len(tail)]
        self._run = bytearray(tail)
        text = self._out(_decoded_run(whole))
        self._strip = False
        return text


def _decoded_run(run: bytearray) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return REPLACEMENT * len(run)


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

    def gap(self, token_id: int) -> int:
        before, held = self._decode(self._ids[: self._read]), self._decode(self._ids)
        after = self._decode([*self._ids, token_id]).rstrip(REPLACEMENT)
        if len(held) <= len(before):
            return 0
        same = next((i for i, (a, b) in enumerate(zip(held, after)) if a != b), min(len(held), len(after)))
        return max(0, same - len(before))

    def settle(self) -> str:
        """Keep the ids as context."""
        return ""

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

    def __init__(
        self,
        table: PieceTable,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown_ids: Collection[int] = (),
    ) -> None:
        self._table = table
        self._skipped = table.special_ids.difference(shown_ids) if skip_special_tokens else frozenset()
        self._decoder = _KINDS[table.kind](table)
        self._texts: list[str] = []
        self._length = self._latest = 0
        self._opens = True
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
            self._opens = False
            self._decoder.settle()

    def place(self, token_id: int) -> tuple[int, bool]:
        """Where the next token would begin: at which character of the text, and whether it opens the whole text.

        Of a token that is left out it is where the following one begins, as far as is known.
        """
        gap = 0 if token_id in self._skipped else self._decoder.gap(token_id)
        self._latest = max(self._latest, self._length + gap)
        return self._latest, self._opens

    def skipped_tokens(self) -> dict[int, str]:
        """The ids that are left out of the text, with the text of each."""
        pieces = {token_id: self._table.piece(token_id) for token_id in sorted(self._skipped)}
        return {token_id: piece for token_id, piece in pieces.items() if piece}

    @property
    def text(self) -> str:
        """All text returned so far."""
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    def push(self, ids: Sequence[int]) -> str:
        """Add generated ids; returns the text that is now final, perhaps empty."""
        visible = [token_id for token_id in ids if token_id not in self._skipped]
        self._opens = self._opens and not visible
        return self._add("".join([self._decoder.feed(token_id) for token_id in visible]))

    def flush(self) -> str:
        """End the sequence; returns the text held back, with U+FFFD for an incomplete character."""
        return self._add(self._decoder.finish())

    def settle(self) -> str:
        """End the prompt. Returns its text without a last, incomplete character, which the output may complete."""
        return self._add(self._decoder.settle())

    def _add(self, text: str) -> str:
        if text:
            self._texts.append(text)
            self._length += len(text)
        return text

    def state(self) -> dict[str, Any]:
        """Plain data from which `restore` continues, here or in another process."""
        return {"text": self.text, "opens": self._opens, **self._decoder.state()}

    def restore(self, state: Mapping[str, Any]) -> Detokenizer:
        """Continue from a `state()`; returns self."""
        self._texts, self._length, self._opens = [state["text"]], len(state["text"]), bool(state["opens"])
        self._decoder.restore(state)
        return self
