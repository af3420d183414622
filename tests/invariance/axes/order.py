"""The order in which requests arrive."""

from headrace.engine.schedule.scheduler import Scheduler
from invariance.axis import Axis, Batches, Mutant


def arrivals(batches: Batches, order: str) -> Batches:
    if order == "reverse":
        return [batch[::-1] for batch in batches[::-1]]
    if order == "staggered":
        return [step for batch in batches for item in batch for step in ([item], [])]
    return batches


def noise_by_arrival(patch):
    """Noise that counts requests as they arrive."""
    right = Scheduler.add

    def add(self, request):
        right(self, request)
        request.seed = request.arrival

    patch.setattr(Scheduler, "add", add)


AXIS = Axis(
    values=("forward", "reverse", "staggered"),
    arrivals=arrivals,
    mutants=(Mutant(noise_by_arrival, load=16, sampling="seeded", order="reverse"),),
)
