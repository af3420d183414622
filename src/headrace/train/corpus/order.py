"""Permutations that are a function of numbers alone: the same in every process and with every version of numpy."""

from __future__ import annotations

import numpy as np

__all__ = ["HOLD_OUT", "permutation"]

WORD = 2**64 - 1
HOLD_OUT = WORD
"""In place of an epoch: the permutation that says which documents are held out."""


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n]: 0 … n-1 in the order of (seed, epoch). 24 bytes for each, for a moment.

    Philox's bits never change between versions of numpy; the shuffles built on them may, so this sorts by the bits.
    """
    keys = np.random.Philox(key=np.array([seed & WORD, epoch & WORD], dtype=np.uint64)).random_raw(n)
    return np.argsort(np.asarray(keys, dtype=np.uint64), kind="stable")
