"""`gathering`: a module's forward that gathers its weights before use, in forward and in backward (stage 3).

The calls of one step, for blocks 1 and 2; each gather also prefetches the next line's unit:

    forward    gather 1, compute, release 1    gather 2, compute, release 2
    backward   gather 2, compute, release 2    gather 1, compute, release 1

Backward has no call of its own: an identity on the outputs gathers when their gradients are complete, before the
module's backward; one on the inputs releases when theirs are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from headrace.zero.weights import Weights

__all__ = ["gathering"]


def gathering(
    inner: Callable[..., Any], weights: Weights, unit: int, before: int | None, after: int | None, backward: bool = True
) -> Callable[..., Any]:
    """`inner` with `unit` gathered around it. `after`: the unit that forward uses next; `before`: that backward does.

    Both are prefetched. `backward` False: backward does not need the unit.
    """

    def call(*arguments: Any) -> Any:
        again = backward and torch.is_grad_enabled()
        turns = after is None and not backward and torch.is_grad_enabled()
        weights.gather(unit, before if turns else after)
        if again:
            arguments = _in_backward(lambda: weights.release(unit), arguments)
        result = inner(*arguments)
        if again:
            one = not isinstance(result, tuple)
            results = _in_backward(lambda: weights.gather(unit, before), (result,) if one else result)
            result = results[0] if one else results
        weights.release(unit)
        return result

    return call


def _in_backward(act: Callable[[], None], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values; backward calls `act` once, when the gradients of all their tensors are complete."""
    differentiable = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    passed = _CallInBackward.apply(act, *(values[i] for i in differentiable))  # type: ignore[no-untyped-call]
    together = list(values)
    for i, value in zip(differentiable, passed):
        together[i] = value
    return tuple(together)


class _CallInBackward(Function):
    @staticmethod
    def forward(ctx: Any, act: Callable[[], None], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.act = act
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.act()
        return None, *gradients
