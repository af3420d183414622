"""What becomes of a running request when the cache is too small for the load."""

from headrace.engine.run.runner import Runner
from headrace.engine.schedule.pool import RequestPool
from invariance.axis import Axis, Mutant, Setup


def setup(setup: Setup, preemption: str) -> None:
    if preemption != "never":
        setup.options["preemption"] = preemption
        setup.sequences, setup.spare_tokens = 1, 64


def noise_by_epoch(patch):
    """Noise that counts how often a request was admitted."""
    right = RequestPool.preempt

    def preempt(self, request, plan):
        right(self, request, plan)
        request.seed += 1

    patch.setattr(RequestPool, "preempt", preempt)


def swaps_in_reverse(patch):
    """Swapped blocks that come back in the wrong order."""
    right = Runner.submit

    def submit(self, plan):
        slots = [slot for slot, _ in plan.swap_in]
        plan.swap_in = list(zip(reversed(slots), (block for _, block in plan.swap_in)))
        return right(self, plan)

    patch.setattr(Runner, "submit", submit)


AXIS = Axis(
    values=("never", "recompute", "swap"),
    setup=setup,
    mutants=(
        Mutant(noise_by_epoch, load=16, sampling="seeded", preemption="recompute"),
        Mutant(swaps_in_reverse, load=16, sampling="seeded", preemption="swap"),
    ),
)
