"""Sets of token ids as packed words: bit (id & 31) of uint32 word id >> 5."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

__all__ = ["clear_ids", "set_ids"]


def set_ids(words_W: np.ndarray, ids: Iterable[int]) -> None:
    """Set the bits of these ids."""
    found = np.fromiter(ids, np.uint32)
    np.bitwise_or.at(words_W, found >> 5, np.uint32(1) << (found & 31))


def clear_ids(words_W: np.ndarray, ids: Iterable[int]) -> None:
    """Clear the bits of these ids."""
    found = np.fromiter(ids, np.uint32)
    np.bitwise_and.at(words_W, found >> 5, ~(np.uint32(1) << (found & 31)))
