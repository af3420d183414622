"""Tinyworld as training data: endless texts from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from headrace.errors import ConfigError
from headrace.text.tokenizer import Tokenizer
from headrace.train.corpus.pieces import DocumentPiece, cut, same_data
from headrace.train.tinyworld import Document, build_tokenizer, documents, exam, prompts

__all__ = ["World", "encode_document"]

WHOLE_EXAM = 10**6
"""More than the exam has questions."""


def encode_document(text: Document, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64, counts bool) of a text: replies and the end token after each count."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the tokenizer has no end token: training needs one to end each text")
    ids: list[int] = []
    counts: list[bool] = []
    for prompt, reply in text.turns:
        for part, counted in ((tokenizer.encode(prompt), False), ([*tokenizer.encode(reply), eos], True)):
            ids += part
            counts += [counted] * len(part)
    return np.array(ids, dtype=np.int64), np.array(counts, dtype=bool)


class World:
    """Tinyworld's tokenizer, its training texts, and its exam as held-out texts."""

    def __init__(self, vocab_size: int, seed: int, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer`: that of the model from which training starts; None for tinyworld's own."""
        self._vocab_size = vocab_size
        self._seed = seed
        self.tokenizer = build_tokenizer(vocab_size, seed) if tokenizer is None else tokenizer

    def pieces(self, seq_length: int, state: dict[str, Any] | None) -> WorldPieces:
        """The training texts' pieces, from `state` on."""
        run = {
            "data.source": "tinyworld",
            "data.seed": self._seed,
            "data.vocab_size": self._vocab_size,
            "train.seq_length": seq_length,
        }
        taken = [0, 0] if state is None else same_data(state, run, WorldPieces.COUNTERS)
        return WorldPieces(documents(self._seed), self.tokenizer, seq_length, run, *taken)

    def held_out(self, seq_length: int) -> Iterator[DocumentPiece]:
        """The exam's pieces."""
        for _, prompt, answer in exam(self._seed, WHOLE_EXAM):
            yield from cut(*encode_document(Document(((prompt, answer),)), self.tokenizer), seq_length)

    def prompts(self, n: int) -> list[str]:
        """Openings of stories, and questions of the exam."""
        return prompts(n, self._seed)


class WorldPieces:
    """Endless pieces of texts. The state is the number of texts taken, and of pieces taken from the next text."""

    COUNTERS = ("documents", "pieces")

    def __init__(
        self,
        texts: Iterator[Document],
        tokenizer: Tokenizer,
        seq_length: int,
        run: dict[str, Any],
        taken: int,
        pieces: int,
    ) -> None:
        self._texts = islice(texts, taken, None)
        self._tokenizer = tokenizer
        self._seq_length = seq_length
        self._run = run
        self._taken = taken
        self._at = pieces
        self._pieces = self._read()

    def peek(self) -> DocumentPiece:
        """The next piece."""
        while self._at >= len(self._pieces):
            self._pieces, self._at = self._read(), 0
            self._taken += 1
        return self._pieces[self._at]

    def advance(self) -> None:
        """Move to the next piece."""
        self.peek()
        self._at += 1

    def state(self) -> dict[str, Any]:
        """Where the next piece is."""
        return {**self._run, "documents": self._taken, "pieces": self._at}

    def _read(self) -> list[DocumentPiece]:
        return cut(*encode_document(next(self._texts), self._tokenizer), self._seq_length)
