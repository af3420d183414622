"""AdamW and the gradients' norm, each with one fixed order of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.ops import Ops
from headrace.parallel.group import RankGroup
from headrace.train.config import OptimizerConfig

__all__ = ["NORM_CHUNK", "AdamW", "Moments", "PairwiseSum", "global_norm"]

NORM_CHUNK = 4096
"""Gradient elements whose squares are summed together, counted from each parameter's start."""


def global_norm(grads: Iterable[Tensor], ops: Ops, group: RankGroup | None = None) -> float:
    """The norm of all gradients together, in fp64; NaN where one is not finite.

    Each gradient is cut into chunks of `NORM_CHUNK`; a chunk is summed alone and the chunks' sums are added
    exactly, so it does not depend on who holds which chunk. The ranks of `group` each give what they have.
    """
    own = [ops.sum_of_squares(grad.reshape(-1), NORM_CHUNK).cpu() for grad in grads]
    sums_N = torch.cat(own) if own else torch.zeros(0, dtype=torch.float64)
    sums = (sums_N if group is None else group.all_gather_uneven(sums_N, "norm")).tolist()
    return math.sqrt(math.fsum(sums)) if all(map(math.isfinite, sums)) else math.nan


class PairwiseSum:
    """Adds lists of gradients in a balanced tree, neighbours first, holding log₂ of them at a time."""

    def __init__(self) -> None:
        self._held: list[tuple[int, list[Tensor]]] = []

    def add(self, grads: Sequence[Tensor]) -> None:
        """Take the next list; its tensors may be changed."""
        self._held.append((1, list(grads)))
        while len(self._held) > 1 and self._held[-2][0] == self._held[-1][0]:
            self._merge()

    def total(self) -> list[Tensor]:
        """The sum of all lists, at least one."""
        while len(self._held) > 1:
            self._merge()
        return self._held[0][1]

    def _merge(self) -> None:
        count, last = self._held.pop()
        before, grads = self._held.pop()
        self._held.append((before + count, [a.add_(b) for a, b in zip(grads, last)]))


@dataclass(slots=True)
class Moments:
    """What AdamW knows of one parameter, flat and fp32. `master` is the parameter itself where that is fp32."""

    master: Tensor
    first: Tensor
    second: Tensor
    stored: Tensor | None
    """The parameter, where it is 16 bits wide: it receives the rounded master."""
    decay: float


class AdamW:
    """Adam with decoupled weight decay and bias correction (Loshchilov and Hutter).

    State is kept by parameter, under its name. Decay applies to parameters of two axes or more. Parameters stored
    in 16 bits have an fp32 master, which is what the updates add up in.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: OptimizerConfig, ops: Ops) -> None:
        self._config = config
        self._ops = ops
        self.steps = 0
        self.state = {name: _moments(parameter.detach(), config.weight_decay)
                      for name, parameter in parameters.items()}

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], rate: float, scale: float = 1.0) -> None:
        """Update every parameter from its gradient times `scale`; gradients are in the parameters' order."""
        config = self._config
        self.steps += 1
        for moments, grad in zip(self.state.values(), grads, strict=True):
            self._ops.adamw_(moments.master, grad.reshape(-1), moments.first, moments.second, moments.stored, rate=rate,
                             beta1=config.beta1, beta2=config.beta2, eps=config.eps, decay=moments.decay,
                             step=self.steps, scale=scale)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all state that is not in the parameters, to be read or filled."""
        for name, moments in self.state.items():
            if moments.stored is not None:
                yield f"master/{name}", moments.master
            yield f"first/{name}", moments.first
            yield f"second/{name}", moments.second


def _moments(parameter: Tensor, weight_decay: float) -> Moments:
    flat = parameter.view(-1)
    narrow = flat.dtype != torch.float32
    master = flat.float() if narrow else flat
    return Moments(master, torch.zeros_like(master), torch.zeros_like(master), flat if narrow else None,
                   weight_decay if parameter.ndim >= 2 else 0.0)
