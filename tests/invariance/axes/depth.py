"""How many steps are in flight at once."""

from headrace.engine.run.runner import Runner
from invariance.axis import Axis, Mutant, Setup


def setup(setup: Setup, depth: int) -> None:
    setup.options["queue_depth"] = depth


def mixes_up_previous(patch):
    """A planned token that resolves to the neighbour's."""
    right = Runner._resolve_previous

    def resolve(self, batch):
        rows = list(self._sampled)
        batch.previous = [(row, rows[0]) for row, _ in batch.previous]
        right(self, batch)

    patch.setattr(Runner, "_resolve_previous", resolve)


AXIS = Axis(values=(1, 2), setup=setup, mutants=(Mutant(mixes_up_previous, load=16, depth=2),))
