"""Read a built folder: memory-mapped tokens, and their pieces in the order of an epoch.

D documents to train on   P pieces of an epoch
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from headrace.config import require
from headrace.errors import ConfigError
from headrace.text.tokenizer import Tokenizer
from headrace.train.corpus.index import INDEX, OFFSETS, VALIDATION, Index, read_index, sha256
from headrace.train.corpus.order import permutation
from headrace.train.corpus.pieces import DAMAGED, DocumentPiece, same_data

__all__ = ["Corpus", "CorpusPieces", "check_folder"]

PROMPT_TOKENS = 16


class Corpus:
    """A built folder. Opening it checks sizes, not hashes: `check_folder` reads every byte.

    Raises `ConfigError` that names the file at fault.
    """

    def __init__(self, folder: str | Path, seed: int = 0, shuffle: str = "documents") -> None:
        self._folder = Path(folder)
        self._seed = seed
        self._shuffle = shuffle
        self.index = read_index(folder)
        self.tokenizer = Tokenizer.from_folder(folder)
        self._offsets = self._array(OFFSETS)
        self.validation = self._array(VALIDATION)
        lengths = np.diff(self._offsets)
        require(
            len(lengths) == self.index.documents
            and self._offsets[0] == 0
            and int(lengths.min()) >= 2
            and int(self._offsets[-1]) == self.index.tokens,
            f"{self._folder / OFFSETS} is damaged: build it again",
        )
        held_out = np.zeros(len(lengths), dtype=bool)
        known = bool(np.all((self.validation >= 0) & (self.validation < len(lengths))))
        require(
            len(self.validation) == self.index.validation and known,
            f"{self._folder / VALIDATION} is damaged: build it again",
        )
        held_out[self.validation] = True
        self.training = np.flatnonzero(~held_out)
        self.lengths = lengths
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.index.shards)])
        self._tokens = [self._map(shard.file, self.index.token_dtype, shard.tokens) for shard in self.index.shards]
        self._masks = [
            self._map(shard.mask, "uint8", -(-shard.tokens // 8)) for shard in self.index.shards if self.index.masked
        ]

    def piece(self, document: int, start: int, seq_length: int) -> DocumentPiece:
        """The piece of a document that begins at its token `start`."""
        stop = min(start + seq_length + 1, int(self.lengths[document]))
        begin = int(self._offsets[document]) + start
        shard = int(np.searchsorted(self._starts, begin, side="right")) - 1
        a = begin - int(self._starts[shard])
        b = a + stop - start
        ids = self._tokens[shard][a:b].astype(np.int64)
        require(
            len(ids) == stop - start and int(ids.max()) < self.index.vocab_size,
            f"{self._folder / self.index.shards[shard].file} is damaged: document {document} has ids outside of the "
            "vocabulary, or too few tokens; build it again",
        )
        if not self.index.masked:
            return DocumentPiece(ids, np.ones(len(ids), dtype=bool))
        bits = np.unpackbits(self._masks[shard][a // 8 : -(-b // 8)], bitorder="little")
        return DocumentPiece(ids, bits[a % 8 : a % 8 + b - a].astype(bool))

    def pieces(self, seq_length: int, state: dict[str, Any] | None) -> CorpusPieces:
        """The training documents' pieces, epoch after epoch, from `state` on."""
        run = {
            "data.source": self.index.identity,
            "data.seed": self._seed,
            "data.shuffle": self._shuffle,
            "train.seq_length": seq_length,
        }
        taken = [0, 0] if state is None else same_data(state, run, CorpusPieces.COUNTERS)
        return CorpusPieces(self, seq_length, self._seed, self._shuffle, run, *taken)

    def held_out(self, seq_length: int) -> Iterator[DocumentPiece]:
        """The held-out documents' pieces."""
        for document in self.validation:
            for start in range(0, int(self.lengths[document]) - 1, seq_length):
                piece = self.piece(int(document), start, seq_length)
                if piece.counts[1:].any():
                    yield piece

    def prompts(self, n: int) -> list[str]:
        """Openings of held-out documents, then of others; of masked data, up to the first token that counts."""
        around = self.tokenizer.encode("")
        texts = []
        for document in [*self.validation[:n], *self.training[:n]][:n]:
            piece = self.piece(int(document), 0, int(self.lengths[document]))
            length = int(np.argmax(piece.counts)) if self.index.masked else min(PROMPT_TOKENS, -(-piece.length // 2))
            ids = piece.ids[:length].tolist()
            ids = ids[len(around) :] if around and ids[: len(around)] == around else ids
            texts.append(self.tokenizer.decode(ids, skip_special_tokens=False))
        return texts

    def _array(self, name: str) -> np.ndarray:
        file = self._folder / name
        try:
            array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{file} is damaged: {error}; build it again") from None
        require(array.ndim == 1 and array.dtype == np.int64, f"{file} is damaged: build it again")
        return array

    def _map(self, name: str, dtype: str, size: int) -> np.ndarray:
        file, kind = self._folder / name, np.dtype(dtype).newbyteorder("<")
        try:
            found = file.stat().st_size
            require(
                found == size * kind.itemsize,
                f"{file} has {found} bytes, not the {size * kind.itemsize} in {INDEX}: build it again",
            )
            return np.memmap(file, dtype=kind, mode="r", shape=(size,)) if size else np.zeros(0, dtype=kind)
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}; build it again") from None


class CorpusPieces:
    """Epochs of a folder's pieces. The order of an epoch is a function of the seed and its number."""

    COUNTERS = ("epoch", "pieces")

    def __init__(
        self, corpus: Corpus, seq_length: int, seed: int, shuffle: str, run: dict[str, Any], epoch: int, taken: int
    ) -> None:
        self._corpus = corpus
        self._seq_length = seq_length
        self._seed = seed
        self._shuffle = shuffle
        self._run = run
        self._epoch = epoch
        self._taken = taken
        self._counts_D = -(-(corpus.lengths[corpus.training] - 1) // seq_length)
        self._total = int(self._counts_D.sum())
        self._next: DocumentPiece | None = None
        self._arrange()
        require(taken <= self._total, DAMAGED)

    def peek(self) -> DocumentPiece:
        """The next piece with a token that counts."""
        while self._next is None:
            if self._taken == self._total:
                self._epoch, self._taken = self._epoch + 1, 0
                self._arrange()
            piece = self._read(self._taken)
            if piece.counts[1:].any():
                self._next = piece
            else:
                self._taken += 1
        return self._next

    def advance(self) -> None:
        """Move to the next piece."""
        self.peek()
        self._next = None
        self._taken += 1

    def state(self) -> dict[str, Any]:
        """Where the next piece is."""
        return {**self._run, "epoch": self._epoch, "pieces": self._taken}

    def _arrange(self) -> None:
        """Compute the epoch's order, of documents (whose pieces stay together) or of pieces."""
        documents = len(self._counts_D)
        by_pieces = self._shuffle == "pieces"
        self._order_P = permutation(self._total, self._seed, self._epoch) if by_pieces else None
        self._order_D = np.arange(documents) if by_pieces else permutation(documents, self._seed, self._epoch)
        self._ends_D = np.cumsum(self._counts_D[self._order_D])

    def _read(self, number: int) -> DocumentPiece:
        """Piece `number` of the epoch."""
        number = number if self._order_P is None else int(self._order_P[number])
        at = int(np.searchsorted(self._ends_D, number, side="right"))
        document = self._order_D[at]
        earlier = int(self._ends_D[at] - self._counts_D[document])
        start = (number - earlier) * self._seq_length
        return self._corpus.piece(int(self._corpus.training[document]), start, self._seq_length)


def check_folder(folder: str | Path) -> Index:
    """Read every file of a built folder and compare its hash. Raises `ConfigError` that names the damaged one."""
    corpus = Corpus(folder)
    named = {**corpus.index.files}
    for shard in corpus.index.shards:
        named |= {shard.file: shard.sha256} | ({shard.mask: shard.mask_sha256} if corpus.index.masked else {})
    for name, expected in named.items():
        require(
            sha256(Path(folder) / name) == expected,
            f"{Path(folder) / name} is damaged: its hash is not that of the build; build it again",
        )
    return corpus.index
