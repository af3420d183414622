"""AdamW, its learning rate and the gradients' norm, each with one fixed order of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.train.config import TrainConfig

__all__ = ["NORM_CHUNK", "AdamW", "global_norm", "learning_rate"]

NORM_CHUNK = 4096
"""Gradient elements whose squares are summed together, counted from each parameter's start."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step `step`, counted from 1: a linear warm-up, then a cosine down to the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    low = config.final_lr_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def global_norm(grads: Sequence[Tensor]) -> float:
    """The norm of all gradients together, in fp64.

    Each gradient is cut into chunks of `NORM_CHUNK`; a chunk is summed alone and the chunks' sums are added
    exactly, so it does not depend on who holds which chunk.
    """
    sums: list[float] = []
    for grad in grads:
        flat = grad.flatten()
        whole = flat.numel() // NORM_CHUNK * NORM_CHUNK
        for part in (flat[:whole].view(-1, NORM_CHUNK), flat[whole:].view(1, -1)):
            sums += part.double().square().sum(dim=1).tolist()
    return math.sqrt(math.fsum(sums)) if all(map(math.isfinite, sums)) else math.nan


class AdamW:
    """Adam with decoupled weight decay and bias correction (Loshchilov and Hutter).

    The moments are fp32, each in one flat tensor over all parameters in their order: a dozen passes over memory
    a step, whatever the number of parameters. Decay applies to parameters of two axes or more.
    """

    def __init__(self, parameters: Sequence[Tensor], config: TrainConfig) -> None:
        self._config = config
        self._parameters = [parameter.detach() for parameter in parameters]
        self._sizes = [parameter.numel() for parameter in parameters]
        device = parameters[0].device
        self._first = torch.zeros(sum(self._sizes), device=device)
        self._second = torch.zeros(sum(self._sizes), device=device)
        self._steps = 0

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], rate: float, scale: float = 1.0) -> None:
        """Update every parameter from its gradient times `scale`."""
        config = self._config
        self._steps += 1
        flat = torch.cat([grad.flatten().float() for grad in grads])
        if scale != 1.0:
            flat.mul_(scale)
        self._first.lerp_(flat, 1 - config.beta1)
        self._second.mul_(config.beta2).addcmul_(flat, flat, value=1 - config.beta2)
        correction = math.sqrt(1 - config.beta2**self._steps)
        denominator = torch.sqrt(self._second, out=flat).div_(correction).add_(config.eps)
        update = torch.div(self._first, denominator, out=flat).mul_(-rate / (1 - config.beta1**self._steps))
        for parameter, part in zip(self._parameters, update.split(self._sizes)):
            if parameter.ndim >= 2:
                parameter.mul_(1 - rate * config.weight_decay)
            parameter.add_(part.view(parameter.shape))
