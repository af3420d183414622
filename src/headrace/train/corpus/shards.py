"""Write shards: files of tokens, and of loss-mask bits where only some tokens count."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import numpy as np

from headrace.train.corpus.index import OFFSETS, Shard, sha256

__all__ = ["SHARD_TOKENS", "ShardWriter", "flushed"]

SHARD_TOKENS = 1 << 26
"""Tokens after which a shard takes no further document."""


class ShardWriter:
    """Appends documents. It keeps 8 bytes of memory per document, its offset."""

    def __init__(self, folder: Path, dtype: str, masked: bool, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._masked = masked
        self._shard_tokens = shard_tokens
        self._offsets = array("q", [0])
        self._shards: list[Shard] = []
        self._bits = np.zeros(0, dtype=bool)
        self._in_shard = 0
        self.tokens = 0
        self.counted = 0
        self._open()

    @property
    def documents(self) -> int:
        """The number of complete documents."""
        return len(self._offsets) - 1

    def extend(self, ids: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append tokens to the document; `counts` (bool) where the data is masked."""
        self._data.write(ids.astype(self._dtype).tobytes())
        self.tokens += len(ids)
        self._in_shard += len(ids)
        self.counted += len(ids) if counts is None else int(counts.sum())
        if self._masked:
            bits = np.concatenate([self._bits, np.ones(len(ids), dtype=bool) if counts is None else counts])
            whole = len(bits) // 8 * 8
            self._mask.write(np.packbits(bits[:whole], bitorder="little").tobytes())
            self._bits = bits[whole:]

    def end_document(self) -> None:
        """End the document; may begin a new shard."""
        self._offsets.append(self.tokens)
        if self._in_shard >= self._shard_tokens:
            self._close()
            self._open()

    def finish(self) -> tuple[Shard, ...]:
        """Close the last shard and write the documents' offsets."""
        self._close()
        np.save(self._folder / OFFSETS, np.frombuffer(self._offsets, dtype=np.int64), allow_pickle=False)
        return tuple(self._shards)

    def abandon(self) -> None:
        """Close the files without finishing them."""
        self._data.close()
        if self._masked:
            self._mask.close()

    def _open(self) -> None:
        self._file = self._folder / f"shard-{len(self._shards):05d}.bin"
        self._data = self._file.open("wb")
        if self._masked:
            self._mask = self._file.with_suffix(".mask").open("wb")

    def _close(self) -> None:
        if self._masked:
            self._mask.write(np.packbits(self._bits, bitorder="little").tobytes())
        self.abandon()
        mask = sha256(self._file.with_suffix(".mask")) if self._masked else ""
        self._shards.append(Shard(self._file.name, self._in_shard, sha256(self._file), mask))
        self._bits = np.zeros(0, dtype=bool)
        self._in_shard = 0


def flushed(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
