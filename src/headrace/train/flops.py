"""The arithmetic of a step, and this machine's rate of it: the two numbers in `mfu`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from headrace.model.transformer import Transformer
from headrace.train.data import TrainingBatch

__all__ = ["matrix_rate", "model_flops"]

SIDE, REPEATS = 1024, 5


def model_flops(model: Transformer, batch: TrainingBatch) -> float:
    """Operations of one step's forward and backward, without recomputation.

    6 for every parameter of the blocks and token, 6 for every parameter of the head and predicted token, and
    12 · layers · heads · head_dim for every token and position that it attends to. Embedding look-ups count as 0.
    """
    config = model.config
    blocks = sum(math.prod(piece.shape) for block in model.blocks for _, piece in block.tensors(""))
    body = 6.0 * blocks * batch.num_tokens
    head = 6.0 * config.vocab_size * config.hidden_size * len(batch.rows_R)
    seen = 0.0
    for layer in range(config.num_layers):
        window = config.window(layer)
        seen += sum(_positions_seen(length, window) for length in batch.lengths)
    return body + head + 12.0 * config.num_heads * config.head_dim * seen


def _positions_seen(length: int, window: int) -> float:
    """Positions that all tokens of a sequence attend to, summed, their own included."""
    reach = min(length, window) if window else length
    return reach * (reach + 1) / 2 + (length - reach) * reach


def matrix_rate(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations per second of this machine's fp32 matrix product: the best of a few short ones."""
    x = torch.full((SIDE, SIDE), 0.5, device=device)
    best = 0.0
    for _ in range(REPEATS):
        began = clock()
        torch.mm(x, x)[0, 0].item()
        best = max(best, 2.0 * SIDE**3 / max(clock() - began, 1e-9))
    return best
