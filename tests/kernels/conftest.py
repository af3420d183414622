"""What tests of kernels share."""

import pytest

from headrace.kernels.cpu import CpuOps, launch


class CutOps(CpuOps):
    """Cuts even the smallest row-wise operation into three ranges, however few CPUs there are."""

    def _tasks(self, rows: int, elements: int) -> int:
        launch.set_threads(self.threads)
        return max(1, min(rows, 3))


@pytest.fixture(scope="session")
def cut() -> CutOps:
    return CutOps(threads=2)
