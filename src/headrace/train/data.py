"""From texts to batches: tokens, targets, which of them count, and where each text begins.

    T tokens of a batch, those of all its texts in a row   R rows that count in the loss
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.errors import ConfigError
from headrace.text.tokenizer import Tokenizer
from headrace.train.config import DataConfig
from headrace.train.tinyworld import Document, build_tokenizer, documents, exam

__all__ = ["Batch", "Source", "batches", "collate"]


@dataclass(slots=True)
class Batch:
    """Packed texts. Each is a sequence of its own: its positions start at 0 and it attends to itself only."""

    ids_T: Tensor
    """int64"""
    positions_T: Tensor
    """int32"""
    lengths: list[int]
    """Tokens of each text; they sum to T."""
    rows_R: Tensor
    """int64: the rows whose prediction counts."""
    targets_R: Tensor
    """int64: what they should predict."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids_T.shape[0]


@dataclass(frozen=True, slots=True)
class _Sample:
    ids: list[int]
    counts: list[bool]
    """Whether each of `ids` counts in the loss."""


class Source:
    """A recipe's data: its tokenizer, its endless training texts, its held-out ones."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self.tokenizer: Tokenizer = build_tokenizer(config.vocab_size, config.seed)

    def training(self) -> Iterator[Document]:
        """Training texts, without end, the same for the same recipe."""
        return documents(self._config.seed)

    def validation(self, n: int) -> list[Document]:
        """`n` held-out texts."""
        return [Document(((prompt, answer),)) for _, prompt, answer in exam(self._config.seed, n)]


def batches(texts: Iterable[Document], tokenizer: Tokenizer, batch_size: int,
            seq_length: int) -> Iterator[Batch]:
    """Batches of `batch_size` rows. A row takes texts while they fit `seq_length`; a longer text is cut."""
    rows: list[list[_Sample]] = [[]]
    room = seq_length
    for text in texts:
        sample = _sample(text, tokenizer, seq_length)
        if len(sample.ids) - 1 > room:
            if len(rows) == batch_size:
                yield _pack([sample for row in rows for sample in row])
                rows = []
            rows.append([])
            room = seq_length
        rows[-1].append(sample)
        room -= len(sample.ids) - 1
    if rows[-1]:
        yield _pack([sample for row in rows for sample in row])


def collate(texts: Sequence[Document], tokenizer: Tokenizer, seq_length: int) -> Batch:
    """One batch of all of `texts`."""
    return _pack([_sample(text, tokenizer, seq_length) for text in texts])


def _sample(text: Document, tokenizer: Tokenizer, seq_length: int) -> _Sample:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the tokenizer has no end token: training needs one to end each text")
    ids: list[int] = []
    counts: list[bool] = []
    for prompt, reply in text.turns:
        for part, counted in ((tokenizer.encode(prompt), False), ([*tokenizer.encode(reply), eos], True)):
            ids += part
            counts += [counted] * len(part)
    return _Sample(ids[: seq_length + 1], counts[: seq_length + 1])


def _pack(samples: Sequence[_Sample]) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for sample in samples:
        start, length = len(ids), len(sample.ids) - 1
        ids += sample.ids[:-1]
        positions += range(length)
        counted = [i for i in range(length) if sample.counts[i + 1]]
        rows += [start + i for i in counted]
        targets += [sample.ids[i + 1] for i in counted]
        lengths.append(length)
    return Batch(torch.tensor(ids), torch.tensor(positions, dtype=torch.int32), lengths, torch.tensor(rows),
                 torch.tensor(targets))
