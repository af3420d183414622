"""How many threads the kernels use."""

from headrace.kernels.cpu import CpuOps
from invariance.axis import Axis, Mutant, Setup


def setup(setup: Setup, threads: int) -> None:
    setup.threads = threads


def sums_by_thread_count(patch):
    """A product that gives each thread a part of the sum."""

    def linear(self, x, weight, bias=None, bounds=None):
        parts = zip(x.chunk(self.threads, 1), weight.float().chunk(self.threads, 1))
        total = sum(a @ b.T for a, b in parts)
        return total if bias is None else total + bias

    patch.setattr(CpuOps, "linear", linear)


AXIS = Axis(values=(2, 1), setup=setup, mutants=(Mutant(sums_by_thread_count, threads=1),))
