"""How many processes hold the model together. Four are more than a small machine has cores."""

from headrace.kernels.cpu import CpuOps
from invariance.axis import Axis, Mutant, Setup


def setup(setup: Setup, ranks: int) -> None:
    setup.ranks = ranks


def sums_what_it_holds_at_once(patch):
    """A rank that does not keep its virtual shards apart; alone, with all four, it does."""
    right = CpuOps.linear

    def linear(self, x, weight, bias=None, bounds=None):
        return right(self, x, weight, bias, bounds if bounds is None or len(bounds) > 3 else None)

    patch.setattr(CpuOps, "linear", linear)


AXIS = Axis(
    values=(1, 2, 4),
    setup=setup,
    costly={
        4: (
            {"model": "gqa-qknorm", "sampling": "seeded", "load": 16},
            {"model": "bf16", "load": 2, "chunk": 64, "prefix": "warm"},
            {"sampling": "penalised", "load": 2, "preemption": "swap", "depth": 2},
        )
    },
    mutants=(Mutant(sums_what_it_holds_at_once, load=2, ranks=2),),
)
