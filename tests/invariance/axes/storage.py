"""How the model's matrices are stored: as rows, or in panels, as a model that is loaded to serve has them."""

import numpy as np

from headrace.kernels.cpu import CpuOps
from headrace.kernels.panels import Panels
from invariance.axis import Axis, Mutant, Setup


def setup(setup: Setup, storage: str) -> None:
    setup.serving = storage == "panels"


def panels_one_row_off(patch):
    """Kernels that take each row of a panel for its neighbour."""
    stored = CpuOps._matrix

    def matrix(self, weight):
        elements, *strides = stored(self, weight)
        return (np.roll(elements, 1) if isinstance(weight, Panels) else elements, *strides)

    patch.setattr(CpuOps, "_matrix", matrix)


AXIS = Axis(values=("rows", "panels"), setup=setup, mutants=(Mutant(panels_one_row_off, storage="panels"),))
