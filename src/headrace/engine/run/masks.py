"""`MaskFiller`: the rows of a step's masks, filled on a thread while the model runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from headrace.engine.run.words import set_ids
from headrace.engine.schedule.plan import SAMPLE, Slice

__all__ = ["MaskFiller", "MaskRows"]

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
        sampled = (s for s in slices if s.targets and s.targets[-1] == SAMPLE)
        masked = [
            (row, s) for row, s in enumerate(sampled) if s.mask is not None or s.params.allowed_token_ids is not None
        ]
        if not masked:
            return lambda: None
        words_EW = np.zeros((len(masked), self._words), np.uint32)
        future: Future[None] = self._thread.submit(self._fill, [s for _, s in masked], words_EW)
        rows = torch.from_numpy(np.asarray([row for row, _ in masked], np.int64))

        def result() -> MaskRows:
            began = time.perf_counter()
            future.result()
            self.waited += time.perf_counter() - began
            return rows.to(self._device), torch.from_numpy(words_EW.view(np.int32)).to(self._device)

        return result

    def _fill(self, slices: Sequence[Slice], words_EW: np.ndarray) -> None:
        began = time.perf_counter()
        for s, words_W in zip(slices, words_EW):
            if s.mask is not None:
                s.mask.fill(words_W)
            elif s.params.allowed_token_ids is not None:
                set_ids(words_W, s.params.allowed_token_ids)
        self.seconds += time.perf_counter() - began
