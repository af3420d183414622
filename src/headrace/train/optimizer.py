"""AdamW and the gradients' norm, each with one fixed order of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headrace.kernels.ops import Ops
from headrace.parallel.group import RankGroup
from headrace.train.config import OptimizerConfig

__all__ = ["AdamW", "Moments", "PairwiseSum", "ParameterGroup", "global_norm"]


def global_norm(chunked: Iterable[tuple[Tensor, int]], ops: Ops, groups: Sequence[RankGroup] = ()) -> float:
    """The norm of all gradients, in fp64; NaN where one is not finite.

    Each flat gradient comes with the length of its chunks: every chunk is summed alone and the sums are added exactly,
    so the norm does not depend on which rank holds a chunk. A collective over each of `groups`.
    """
    own = [ops.sum_of_squares(flat, chunk).cpu() for flat, chunk in chunked]
    sums_N = torch.cat(own) if own else torch.zeros(0, dtype=torch.float64)
    for group in groups:
        sums_N = group.all_gather_uneven(sums_N, "norm")
    sums = sums_N.tolist()
    return math.sqrt(math.fsum(sums)) if all(map(math.isfinite, sums)) else math.nan


class PairwiseSum:
    """Adds n lists of gradients in a balanced tree, neighbours first, holding at most log₂ n + 1 at a time."""

    def __init__(self) -> None:
        self._held: list[tuple[int, list[Tensor]]] = []

    def add(self, grads: Sequence[Tensor]) -> None:
        """Add the next list; its tensors may be overwritten."""
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


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """A flat tensor of weights, and whether weight decay applies to them."""

    weights: Tensor
    decays: bool


@dataclass(slots=True)
class Moments:
    """AdamW's state of one group, flat and fp32. `master` is the weights themselves where these are fp32."""

    master: Tensor
    first: Tensor
    second: Tensor
    stored: Tensor | None
    """The weights, where they are 16 bits wide: they receive the rounded master."""
    decay: float


class AdamW:
    """Adam with decoupled weight decay and bias correction (Loshchilov and Hutter).

    Weights stored in 16 bits have an fp32 master copy, to which the updates are added.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        config: OptimizerConfig,
        ops: Ops,
        offload: Callable[[int], Tensor] | None = None,
    ) -> None:
        """`offload` allocates fp32 memory outside of the device for the state; None keeps it beside the weights."""
        self._config, self._ops = config, ops
        self.steps = 0
        self._offloads = offload is not None
        self.state = [
            _moments(group, config.weight_decay, offload or partial(torch.zeros, device=group.weights.device))
            for group in groups
        ]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], rate: float, scale: float = 1.0) -> None:
        """Update all weights from their gradients times `scale`, one flat tensor for each of the groups."""
        config = self._config
        self.steps += 1
        for moments, grad in zip(self.state, grads, strict=True):
            kept = (moments.master, moments.first, moments.second)
            # Offloaded state is copied to the weights' device, a group at a time; other state is used in place.
            master, first, second = here = [state.to(grad.device) for state in kept]
            self._ops.adamw_(
                master,
                grad,
                first,
                second,
                moments.stored,
                rate=rate,
                beta1=config.beta1,
                beta2=config.beta2,
                eps=config.eps,
                decay=moments.decay,
                step=self.steps,
                scale=scale,
            )
            for state, moved in zip(kept, here):
                if moved is not state:
                    state.copy_(moved)

    def memory(self) -> dict[str, int]:
        """Bytes of the state, by purpose."""
        masters = sum(moments.master.nbytes for moments in self.state if moments.stored is not None)
        moments = sum(moments.first.nbytes + moments.second.nbytes for moments in self.state)
        beside = {"fp32 masters": masters, "optimizer moments": moments}
        nothing = dict.fromkeys(beside, 0)
        return {**(nothing if self._offloads else beside), "offloaded": masters + moments if self._offloads else 0}

    def tensors(self) -> dict[str, list[Tensor | None]]:
        """All state outside of the weights, a flat tensor per group; None where a group has no such state."""
        return {
            "master": [None if moments.stored is None else moments.master for moments in self.state],
            "first": [moments.first for moments in self.state],
            "second": [moments.second for moments in self.state],
        }


def _moments(group: ParameterGroup, weight_decay: float, zeros: Callable[[int], Tensor]) -> Moments:
    flat = group.weights
    narrow = flat.dtype != torch.float32
    count = flat.numel()
    master = zeros(count).copy_(flat) if narrow else flat
    return Moments(master, zeros(count), zeros(count), flat if narrow else None, weight_decay if group.decays else 0.0)
