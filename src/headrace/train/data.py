"""From texts to batches: tokens, targets, which of them count in the loss, and where each text begins.

A batch has rows, a row has sequences: whole documents while they fit, or a piece of a longer one.

    T tokens of a batch, all its sequences one after another   R tokens whose prediction counts
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.config import require
from headrace.text.tokenizer import Tokenizer
from headrace.train.config import DataConfig
from headrace.train.corpus.folder import Corpus
from headrace.train.corpus.pieces import DocumentPiece, Held, PieceStream
from headrace.train.corpus.world import World, encode_document
from headrace.train.tinyworld import Document

__all__ = ["BatchStream", "Source", "TrainingBatch", "batch_of", "collate", "open_source"]


@dataclass(slots=True)
class TrainingBatch:
    """Packed sequences. The positions of each start at 0 and it attends to itself only."""

    ids_T: Tensor
    """int64"""
    positions_T: Tensor
    """int32"""
    lengths: list[int]
    """Tokens of each sequence; they sum to T."""
    rows_R: Tensor
    """int64: indices of the tokens whose predictions count."""
    targets_R: Tensor
    """int64: the tokens to predict."""
    row_of: list[int]
    """The row of each sequence: 0, …, `num_rows` - 1, ascending."""
    tokens_T: Tensor
    """int64: each token's number in the batch that this is a part of; 0, …, T-1 in a whole batch."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids_T.shape[0]

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return self.row_of[-1] + 1

    def share(self, rank: int, ranks: int) -> TrainingBatch:
        """Rows rank, rank + ranks, …: the part of one rank. Possibly no token in it counts.

        Raises `ConfigError` where there are fewer rows than ranks. `share(r, n).share(i, k)` equals
        `share(r + n * i, n * k)`, so the parts are the same however a batch is divided into ranks and micro-batches.
        """
        require(
            0 <= rank < ranks <= self.num_rows,
            f"a batch of {self.num_rows} rows has no part {rank} of {ranks}: raise train.batch_size",
        )
        mine = np.array(self.row_of) % ranks == rank
        lengths = np.array(self.lengths)
        keep_T = torch.from_numpy(np.repeat(mine, lengths))
        place_T = torch.cumsum(keep_T, dim=0) - 1
        keep_R = keep_T[self.rows_R]
        return TrainingBatch(
            self.ids_T[keep_T],
            self.positions_T[keep_T],
            lengths[mine].tolist(),
            place_T[self.rows_R[keep_R]],
            self.targets_R[keep_R],
            (np.array(self.row_of)[mine] // ranks).tolist(),
            self.tokens_T[keep_T],
        )

    def split(self, parts: int) -> list[TrainingBatch]:
        """All `parts` shares: micro-batches whose union is this batch."""
        return [self.share(part, parts) for part in range(parts)]


class BatchStream:
    """Endless batches. They depend on the data, `data.seed`, `batch_size` and `seq_length` alone."""

    def __init__(self, pieces: PieceStream, batch_size: int, seq_length: int) -> None:
        self._pieces = pieces
        self._batch_size = batch_size
        self._seq_length = seq_length

    def next(self) -> TrainingBatch:
        """The next batch of `batch_size` rows: the global one, of which `TrainingBatch.share` takes a rank's part."""
        return _pack(_fill(self._pieces, self._batch_size, self._seq_length))

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, in JSON values, for `Source.stream` with any `batch_size`."""
        return self._pieces.state()


class _TextSource(Protocol):
    """The interface of a kind of data."""

    tokenizer: Tokenizer

    def pieces(self, seq_length: int, state: dict[str, Any] | None) -> PieceStream:
        """The training pieces, from `state` on."""

    def held_out(self, seq_length: int) -> Iterator[DocumentPiece]:
        """The held-out pieces."""

    def prompts(self, n: int) -> list[str]:
        """Texts to continue."""


class Source:
    """A recipe's data: its tokenizer, training batches and held-out batches."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None = None) -> None:
        self._texts: _TextSource = (
            World(config.vocab_size, config.seed, tokenizer)
            if config.source == "tinyworld"
            else Corpus(config.source, config.seed, config.shuffle)
        )
        self.tokenizer: Tokenizer = self._texts.tokenizer

    def stream(self, batch_size: int, seq_length: int, state: dict[str, Any] | None = None) -> BatchStream:
        """Training batches of `batch_size` rows of up to `seq_length` tokens, from a `BatchStream.state` on.

        Raises `ConfigError` that names the setting in which `state` differs from this data.
        """
        return BatchStream(self._texts.pieces(seq_length, state), batch_size, seq_length)

    def validation(self, seq_length: int, batch_size: int, limit: int = 0) -> list[TrainingBatch]:
        """Batches of the first `limit` held-out sequences, or of all for 0; the last may have fewer rows.

        Empty where the data holds nothing out.
        """
        pieces = self._texts.held_out(seq_length)
        held = Held(piece for _, piece in zip(range(limit), pieces)) if limit else Held(pieces)
        found = []
        while held.peek() is not None:
            found.append(_pack(_fill(held, batch_size, seq_length)))
        return found

    def prompts(self, n: int) -> list[str]:
        """Up to `n` prompts that suit the data, for samples during training."""
        return self._texts.prompts(n)


def open_source(config: DataConfig, tokenizer: Tokenizer | None = None) -> Source:
    """A recipe's data. Raises `ConfigError` that names the `data.` key or the file at fault.

    `tokenizer`: that of the model from which training starts, if any; a built folder has its own.
    """
    return Source(config, tokenizer)


def collate(texts: Sequence[Document], tokenizer: Tokenizer, seq_length: int) -> TrainingBatch:
    """One batch of all of `texts`, a row for each; a text longer than `seq_length` is cut short."""
    encoded = [encode_document(text, tokenizer) for text in texts]
    return _pack([[DocumentPiece(ids[: seq_length + 1], counts[: seq_length + 1])] for ids, counts in encoded])


def batch_of(sequences: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> TrainingBatch:
    """One batch of token sequences, a row for each; where `counts[i]`, token i counts in the loss.

    For example the samples of a policy: prompt and completion, of which the completion counts.
    """
    for number, (ids, counts) in enumerate(sequences):
        require(
            len(ids) == len(counts) >= 2,
            f"sequence {number} has {len(ids)} tokens and {len(counts)} counts: give as many of both, "
            "and at least two, as the first token is only read",
        )
    return _pack([[DocumentPiece(np.asarray(ids, np.int64), np.asarray(counts, bool))] for ids, counts in sequences])


def _fill(pieces: PieceStream, batch_size: int, seq_length: int) -> list[list[DocumentPiece]]:
    """The next rows: each takes pieces while they fit."""
    rows: list[list[DocumentPiece]] = [[]]
    room = seq_length
    while (piece := pieces.peek()) is not None:
        if piece.length > room:
            if len(rows) == batch_size:
                break
            rows.append([])
            room = seq_length
        rows[-1].append(piece)
        room -= piece.length
        pieces.advance()
    return rows


def _pack(rows: Sequence[Sequence[DocumentPiece]]) -> TrainingBatch:
    pieces = [piece for row in rows for piece in row]
    lengths = [piece.length for piece in pieces]
    counts_T = np.concatenate([piece.counts[1:] for piece in pieces])
    next_T = np.concatenate([piece.ids[1:] for piece in pieces])
    rows_R = np.flatnonzero(counts_T)
    return TrainingBatch(
        torch.from_numpy(np.concatenate([piece.ids[:-1] for piece in pieces])),
        torch.from_numpy(np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])),
        lengths,
        torch.from_numpy(rows_R),
        torch.from_numpy(next_T[rows_R]),
        [number for number, row in enumerate(rows) for _ in row],
        torch.arange(len(next_T)),
    )
