"""A tokenizer's vocabulary as llguidance takes it."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLTokenizer, TokenizerWrapper

from headrace.errors import RequestError
from headrace.text.tokenizer import Tokenizer

__all__ = ["grammar_tokenizer"]

MARK = "\x02"
"""Put before a text, so that the tokenizer spells it as in the middle of one: without a space of its own."""


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """The vocabulary of a model with `vocab_size` rows; rows that the tokenizer does not know are never allowed.

    Takes about 0.2 s for 50,000 tokens. Raises `RequestError` for a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise RequestError.about("constraint", "{constraint} needs a tokenizer that names its end token (eos_token)")
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, tokenizer.eos_token_id, vocab_size)))


class _Vocabulary:
    """What llguidance reads: bytes of each token, and a function that tokenizes text in the middle of a text."""

    def __init__(self, tokenizer: Tokenizer, eos: int, vocab_size: int) -> None:
        special = tokenizer.special_ids
        self.eos_token_id = eos
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(special)
        known = range(tokenizer.vocab_size)
        # A row without a token has no bytes, so no text ever needs it.
        self.tokens = [
            (tokenizer.pieces([i])[0].encode() if i in special else tokenizer.token_bytes(i)) if i in known else b""
            for i in range(vocab_size)
        ]
        self._tokenizer = tokenizer
        self._by_bytes: dict[bytes, int] = {}
        """Ordinary tokens by their bytes, once a text has no spelling by the tokenizer."""

    def __call__(self, data: bytes) -> list[int]:
        """Token ids of UTF-8 text: the tokenizer's spelling, or the longest tokens where that changes the text."""
        text = data.decode()
        ids = self._tokenizer.spell(text)
        if self._spells(ids, data):
            return ids
        marked = self._tokenizer.spell(MARK + text)
        for start in range(1, min(len(marked), 4) + 1):
            if self._spells(marked[start:], data):
                return marked[start:]
        return self._longest(data)

    def _longest(self, data: bytes) -> list[int]:
        """A text by the longest tokens from its beginning; empty where a byte has none."""
        if not self._by_bytes:
            special = set(self.special_token_ids)
            ordinary = ((piece, i) for i, piece in enumerate(self.tokens) if piece and i not in special)
            for piece, i in ordinary:
                self._by_bytes.setdefault(piece, i)
        longest = max(map(len, self._by_bytes), default=0)
        ids: list[int] = []
        at = 0
        while at < len(data):
            sizes = range(min(longest, len(data) - at), 0, -1)
            size = next((size for size in sizes if data[at : at + size] in self._by_bytes), 0)
            if not size:
                return []
            ids.append(self._by_bytes[data[at : at + size]])
            at += size
        return ids

    def _spells(self, ids: Sequence[int], data: bytes) -> bool:
        return b"".join(self.tokens[i] for i in ids) == data
