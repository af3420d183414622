"""What the ranks of test_group.py do."""

from __future__ import annotations

import torch

from headrace.parallel.operators import f, f_rows, g, g_rows

SIZES = ((1,), (7, 3), (64, 65), (300, 256))


def numbers(rank: int, shape, seed: int = 0) -> torch.Tensor:
    """Numbers of mixed magnitude, so that another order of summation shows."""
    draw = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(shape, generator=draw) * 10.0 ** torch.randint(-3, 4, shape, generator=draw)


def collectives(group):
    out = {}
    for n, shape in enumerate(SIZES):
        x = numbers(group.rank, shape, n)
        out[f"all_reduce {n}"] = group.all_reduce(x, "sum").flatten().tolist()
        out[f"pairs {n}"] = group.all_reduce(x, "pairs", width=2).flatten().tolist()
        rows = numbers(group.rank, (4 * shape[0], 3), n)
        own = group.reduce_scatter(rows, "scatter")
        out[f"scatter {n}"] = own.flatten().tolist()
        out[f"gather {n}"] = group.all_gather(own, "gather").flatten().tolist()
        widths = [2 + rank for rank in range(group.size)]
        mine = numbers(group.rank, (5, widths[group.rank]), n)
        out[f"columns {n}"] = group.gather_columns(mine, widths, "columns").tolist()
    return out


def traffic(group, rows, width):
    group.all_reduce(torch.ones(rows, width), "sum")
    own = group.reduce_scatter(torch.ones(rows, width), "norm")
    group.all_gather(own, "norm")
    counted = group.traffic
    return {
        "messages": [[*key, n] for key, n in sorted(counted.messages.items())],
        "elements": [[*key, n] for key, n in sorted(counted.elements.items())],
        "volume": counted.volume(),
        "volume of norms": counted.volume("norm"),
        "bytes": counted.bytes_sent,
    }


def operators(group):
    """Forward and backward of f, g and their row forms."""
    x = numbers(group.rank, (8, 3)).requires_grad_()
    out = {}
    for name, operator in (("f", f), ("g", g), ("f_rows", f_rows), ("g_rows", g_rows)):
        y = operator(x, group, name)
        (grad,) = torch.autograd.grad(y, x, numbers(group.rank, tuple(y.shape), 1))
        out[name] = [y.tolist(), grad.tolist()]
    return out


def lonely(group):
    """Rank 1 leaves; the others find out at once."""
    if group.rank == 1:
        return "left"
    try:
        group.all_reduce(torch.ones(3), "sum")
    except RuntimeError as error:
        return str(error)
    return "no error"
