"""Hidden dropout, where GPT-2 and Megatron-LM have it: on the outputs that are added to the residual stream.

These are the outputs of the embedding, of every attention and of every MLP. Attention's probabilities are not dropped,
as the paged kernels do not keep them. Whether an element is dropped is a hash of (seed, step, place, the token's number
in the whole batch, feature), so a micro-batch, a copy of the model, a rank with some of the rows and a recomputation
drop the elements that one process would, and backward keeps no mask.

    T tokens   D hidden
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
from torch import Tensor

from headrace.kernels.ops import Ops
from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup
from headrace.parallel.tensor import RowParallelLinear, VocabParallelEmbedding

__all__ = ["Dropout"]


class Dropout:
    """The dropout of one model. It is active only within `during`, so validation and sampling drop nothing."""

    def __init__(self, model: Transformer, ops: Ops, rate: float, seed: int) -> None:
        """Set the `after` hook of every layer that writes into the residual stream; a rate of 0 changes nothing."""
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
        """Drop in forward, and in backward where it recomputes.

        `tokens_T`: each token's number in the step's whole batch, padding included.
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
    """This rank's rows of the residual stream: all, or its share under sequence parallelism."""
    return tokens_T.chunk(group.size)[group.rank] if group.sequence else tokens_T


def _key(seed: int, step: int, place: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(step, place)).generate_state(1, np.uint64)[0])
