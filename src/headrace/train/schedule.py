"""The learning rate of every step: a pure function of the recipe."""

from __future__ import annotations

import math

from headrace.train.config import OptimizerConfig

__all__ = ["learning_rate"]


def learning_rate(config: OptimizerConfig, steps: int, step: int) -> float:
    """The rate of step `step` of `steps`, counted from 1: a warm-up of at most `steps`, then `config.schedule`."""
    warmup = min(config.warmup_steps, steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    low = config.final_lr_ratio
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
    decay_steps = max(1, round(config.decay_ratio * steps))
    left = min(1.0, (steps - step) / decay_steps)
    return config.learning_rate * (low + (1 - low) * left)
