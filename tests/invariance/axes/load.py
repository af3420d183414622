"""How many requests run at once."""

from headrace.kernels.cpu import CpuOps
from invariance.axis import Axis, Mutant, Setup


def setup(setup: Setup, load: int) -> None:
    """The long prompt always, then one with the common prefix, then all in order."""
    setup.prompts = {1: [2], 2: [0, 2]}.get(load, list(range(load)))


def sums_by_row_count(patch):
    """A product that takes another kernel, with another order of summation, for many rows."""
    right = CpuOps.linear

    def linear(self, x, weight, bias=None, bounds=None):
        return x @ weight.float().T if x.shape[0] > 8 and bias is None else right(self, x, weight, bias, bounds)

    patch.setattr(CpuOps, "linear", linear)


AXIS = Axis(values=(1, 2, 16, 64), setup=setup, mutants=(Mutant(sums_by_row_count, load=16),))
