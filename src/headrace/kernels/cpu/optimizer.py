"""AdamW and the gradients' norm on the CPU: one pass over memory each, over flat tensors cut into ranges.

A range computes element by element (AdamW) or whole chunks (sums of squares), so where it is cut changes no bits.
"""

from __future__ import annotations

from numba import prange

from headrace.kernels.cpu.elementwise import share
from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import load8, load8n, store8, store8n
from headrace.kernels.cpu.simd import div8, fma8, mul8, splat8, sqrt8, sub8
from headrace.kernels.cpu.simd64 import add_squares8d, hsum8d, zero8d

__all__ = ["adamw", "sum_of_squares"]

LINES = 64
"""AdamW's ranges are cut between runs of so many elements, whole cache lines of every dtype."""


@kernel
def _adamw8(master, grad, first, second, factors):
    """(master, first, second) after the step, eight of each. See `adamw` for the factors."""
    scale, new1, old2, new2, deepen, eps, keep, pace = factors
    g = mul8(grad, splat8(scale))
    first = fma8(sub8(g, first), splat8(new1), first)
    second = fma8(mul8(g, splat8(new2)), g, mul8(second, splat8(old2)))
    under = fma8(sqrt8(second), splat8(deepen), splat8(eps))
    return fma8(div8(first, under), splat8(pace), mul8(master, splat8(keep))), first, second


@kernel
def _adamw_range(master, grad, first, second, stored, factors, start, stop):
    rounds = stored.size > 0
    tail = (stop - start) & 7
    for k in range(start, stop - tail, 8):
        p, m, v = _adamw8(load8(master, k), load8(grad, k), load8(first, k), load8(second, k), factors)
        store8(master, k, p), store8(first, k, m), store8(second, k, v)
        if rounds:
            store8(stored, k, p)
    if tail:
        k = stop - tail
        p, m, v = _adamw8(
            load8n(master, k, tail), load8n(grad, k, tail), load8n(first, k, tail), load8n(second, k, tail), factors
        )
        store8n(master, k, p, tail), store8n(first, k, m, tail), store8n(second, k, v, tail)
        if rounds:
            store8n(stored, k, p, tail)


@kernel(parallel=True)
def adamw(master, grad, first, second, stored, factors, tasks):
    """See `TrainingOps.adamw_`; an empty `stored` receives nothing.

    factors, fp32: scale, 1 − β1, β2, 1 − β2, 1/√(1 − β2ᵗ), eps, 1 − rate·decay, −rate/(1 − β1ᵗ).
    """
    size = master.size
    if tasks == 1:
        _adamw_range(master, grad, first, second, stored, factors, 0, size)
    else:
        lines = (size + LINES - 1) // LINES
        for task in prange(tasks):
            _adamw_range(
                master,
                grad,
                first,
                second,
                stored,
                factors,
                min(size, share(lines, task, tasks) * LINES),
                min(size, share(lines, task + 1, tasks) * LINES),
            )


@kernel
def _squares(flat, start, stop):
    """Σ x² of the elements start … stop − 1: eight lanes in fp64, counted from the start."""
    acc = zero8d()
    tail = (stop - start) & 7
    for k in range(start, stop - tail, 8):
        acc = add_squares8d(acc, load8(flat, k))
    if tail:
        acc = add_squares8d(acc, load8n(flat, stop - tail, tail))
    return hsum8d(acc)


@kernel
def _squares_range(flat, chunk, out, first, last):
    for c in range(first, last):
        out[c] = _squares(flat, c * chunk, min(flat.size, (c + 1) * chunk))


@kernel(parallel=True)
def sum_of_squares(flat, chunk, out, tasks):
    """out[c] = Σ x² of chunk c, fp64. The last chunk may be shorter."""
    if tasks == 1:
        _squares_range(flat, chunk, out, 0, out.size)
    else:
        for task in prange(tasks):
            _squares_range(flat, chunk, out, share(out.size, task, tasks), share(out.size, task + 1, tasks))
