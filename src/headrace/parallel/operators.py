"""Megatron-LM's conjugate operators, each one collective forward or backward (section 3, figures 3 and 4).

    f   identity forward, all-reduce backward: before a column-parallel linear
    g   all-reduce forward, identity backward: after a row-parallel one

With sequence-parallel norms the stream between blocks is split by rows (Korthikanti et al., 2022, section 4.2), and
each becomes a pair with the same volume:

    f_rows  all-gather forward, reduce-scatter backward       g_rows  reduce-scatter forward, all-gather backward
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from headrace.parallel.group import RankGroup

__all__ = ["f", "f_rows", "g", "g_rows", "shared"]


def f(x: Tensor, group: RankGroup, purpose: str) -> Tensor:
    """x, whose gradient is summed over the ranks."""
    y: Tensor = _F.apply(x, group, purpose)
    return y


def g(x: Tensor, group: RankGroup, purpose: str) -> Tensor:
    """x summed over the ranks."""
    y: Tensor = _G.apply(x, group, purpose)
    return y


def f_rows(x_RD: Tensor, group: RankGroup, purpose: str) -> Tensor:
    """All ranks' rows in rank order; every rank has as many."""
    y: Tensor = _FRows.apply(x_RD, group, purpose)
    return y


def g_rows(x_TD: Tensor, group: RankGroup, purpose: str) -> Tensor:
    """This rank's rows of the sum over the ranks; T is a multiple of their number."""
    y: Tensor = _GRows.apply(x_TD, group, purpose)
    return y


def shared(weight: Tensor, group: RankGroup, partial: bool, purpose: str) -> Tensor:
    """A weight that all ranks hold. Where each sees a part of what it is used on (`partial`), gradients are summed."""
    return f(weight, group, purpose) if partial and group.size > 1 and weight.requires_grad else weight


class _F(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup, purpose: str) -> Tensor:
        ctx.group, ctx.purpose = group, purpose
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g_x: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_reduce(g_x, ctx.purpose), None, None


class _G(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup, purpose: str) -> Tensor:
        return group.all_reduce(x.detach(), purpose)

    @staticmethod
    def backward(ctx: Any, g_x: Tensor) -> tuple[Tensor | None, ...]:
        return g_x, None, None


class _FRows(Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, group: RankGroup, purpose: str) -> Tensor:
        ctx.group, ctx.purpose = group, purpose
        return group.all_gather(x_RD.detach(), purpose)

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.reduce_scatter(g_TD, ctx.purpose), None, None


class _GRows(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: RankGroup, purpose: str) -> Tensor:
        ctx.group, ctx.purpose = group, purpose
        return group.reduce_scatter(x_TD.detach(), purpose)

    @staticmethod
    def backward(ctx: Any, g_RD: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_gather(g_RD, ctx.purpose), None, None
