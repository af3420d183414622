"""`MaskFiller`: the rows of a step's masks, filled on a thread while the model runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from headrace.engine.run.words import set_ids
from headrace.engine.schedule.plan import Slice

__all__ = ["MaskFiller", "MaskRows", "fill_rows"]

MaskRows = tuple[Tensor, Tensor]
"""(row among the sampled ones, packed words), as `Ops.mask_logits_` takes them."""


class MaskFiller:
    """Fills the masks of one step at a time. Grammars release the interpreter's lock, and so do kernels."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._words = -(-vocab_size // 32)
        self._device = device
        self._thread = ThreadPoolExecutor(1, "masks")
        self.seconds = self.waited = 0.0
        """Spent filling rows, and by steps that waited for them, since the start."""

    def start(self, slices: Sequence[Slice]) -> Callable[[], MaskRows | None]:
        """Begin to fill the rows of a plan's slices that sample; the result waits for them. None: none has a mask."""
        masked: list[Slice] = []
        rows: list[int] = []
        count = 0
        for s in slices:
            samples = s.samples
            if samples and (s.mask is not None or s.params.allowed_token_ids is not None):
                masked.append(s)
                rows += range(count, count + samples)
            count += samples
        if not masked:
            return lambda: None
        words_EW = np.zeros((len(rows), self._words), np.uint32)
        future: Future[None] = self._thread.submit(self._fill, masked, words_EW)
        rows_E = torch.from_numpy(np.asarray(rows, np.int64))

        def result() -> MaskRows:
            began = time.perf_counter()
            future.result()
            self.waited += time.perf_counter() - began
            return rows_E.to(self._device), torch.from_numpy(words_EW.view(np.int32)).to(self._device)

        return result

    def _fill(self, slices: Sequence[Slice], words_EW: np.ndarray) -> None:
        began = time.perf_counter()
        row = 0
        for s in slices:
            fill_rows(s, words_EW[row : row + s.samples])
            row += s.samples
        self.seconds += time.perf_counter() - began


def fill_rows(s: Slice, words_NW: np.ndarray) -> None:
    """Fill zeroed words for the rows of a slice that sample: each accounts for the drafts before it."""
    mask = s.mask
    if mask is None:
        assert s.params.allowed_token_ids is not None
        set_ids(words_NW[0], s.params.allowed_token_ids)
        words_NW[1:] = words_NW[0]
        return
    mask.fill(words_NW[0])
    if drafts := s.drafts:
        ahead = mask.fork()  # one that fails behind a draft has no way back
        for draft, words_W in zip(drafts, words_NW[1:]):
            ahead.accept((draft,))
            ahead.fill(words_W)
