"""Dropout where GPT-2 and Megatron-LM have it outside attention: on what joins the residual stream.

That is the embedding's output, and those of every attention part and MLP (hidden dropout). Attention's probabilities
are not dropped: the paged kernels keep none. Nothing is drawn: whether an element is dropped is a hash of (seed, step,
place, the token's number in the whole batch, feature), so a micro-batch, a copy of the model, a rank with some of the
rows and a recomputation drop what one process would, and backward keeps no mask.

    T tokens   D hidden
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
from torch import Tensor

from headrace.kernels.training import TrainingOps
from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup
from headrace.parallel.tensor import RowParallelLinear, VocabParallelEmbedding

__all__ = ["Dropout"]


class Dropout:
    """All places of one model. It drops nothing outside `during`: to validate, sample or score is to call as ever."""

    def __init__(self, model: Transformer, ops: TrainingOps, rate: float, seed: int) -> None:
        """Fill the `after` slots of what writes into the stream of `model`; a rate of 0 leaves the model alone."""
        self.rate, self.seed = rate, seed
        self._ops, self._group = ops, model.group
        self._step = 0
        self._row_T: Tensor | None = None
        places: list[VocabParallelEmbedding | RowParallelLinear] = [model.embed]
        for block in model.blocks:
            places += block.attention.out, block.mlp.down
        for number, place in enumerate(places if rate else ()):
            place.after = partial(self._drop, number)

    @contextmanager
    def during(self, step: int, tokens_T: Tensor) -> Iterator[None]:
        """Drop in forward and, as recomputation repeats it, in backward.

        `tokens_T`: each token's number in the step's whole batch, those of padding too.
        """
        self._step, self._row_T = step, _own_rows(tokens_T, self._group).to(self._ops.device)
        try:
            yield
        finally:
            self._row_T = None

    def _drop(self, place: int, x_TD: Tensor) -> Tensor:
        if self._row_T is None:
            return x_TD
        return self._ops.dropout(x_TD, _key(self.seed, self._step, place), self._row_T, 0, self.rate)


def _own_rows(tokens_T: Tensor, group: RankGroup) -> Tensor:
    """Of the rows of the stream between blocks, this rank's run: all of them, unless they are split."""
    return tokens_T.chunk(group.size)[group.rank] if group.sequence else tokens_T


def _key(seed: int, step: int, place: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(step, place)).generate_state(1, np.uint64)[0])
