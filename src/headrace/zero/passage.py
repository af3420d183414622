"""`passage`: a module's forward that gathers its weights before use, in forward and in backward (stage 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from headrace.zero.weights import Weights

__all__ = ["passage"]


def passage(
    inner: Callable[..., Any], weights: Weights, unit: int, before: int | None, after: int | None, backward: bool = True
) -> Callable[..., Any]:
    """`inner` with `unit` gathered around it. `after`: the unit that forward uses next; `before`: that backward does.

    Both are prefetched. `backward` False: backward does not need the unit.
    """

    def call(*arguments: Any) -> Any:
        way_back = backward and torch.is_grad_enabled()
        turns = after is None and not backward and torch.is_grad_enabled()
        weights.enter(unit, before if turns else after)
        if way_back:
            arguments = _on_the_way_back(lambda: weights.leave(unit), arguments)
        result = inner(*arguments)
        if way_back:
            result = (
                _on_the_way_back(lambda: weights.enter(unit, before), result)
                if isinstance(result, tuple)
                else _on_the_way_back(lambda: weights.enter(unit, before), (result,))[0]
            )
        weights.leave(unit)
        return result

    return call


def _on_the_way_back(act: Callable[[], None], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values; backward calls `act` once, when the gradients of all their tensors are complete."""
    travel = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    passed = _Then.apply(act, *(values[i] for i in travel))  # type: ignore[no-untyped-call]
    together = list(values)
    for i, value in zip(travel, passed):
        together[i] = value
    return tuple(together)


class _Then(Function):
    @staticmethod
    def forward(ctx: Any, act: Callable[[], None], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.act = act
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.act()
        return None, *gradients
