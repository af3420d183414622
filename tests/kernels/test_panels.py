"""`Panels`: what is put comes back, wherever pieces begin; what does not fit is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.kernels.cpu import CpuOps
from headrace.kernels.delegate import ServingOps
from headrace.kernels.panels import Panels, rows_of
from headrace.kernels.reference import ReferenceOps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(st.data(), st.integers(1, 90), st.integers(1, 20), st.sampled_from(DTYPES))
def test_pieces_of_any_size_come_back(data, rows, columns, dtype):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    panels = Panels(rows, columns, dtype, torch.device("cpu"))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    pieces = list(itertools.pairwise((0, *cuts, rows)))
    for start, stop in data.draw(st.permutations(pieces)):
        panels.put(start, weight[start:stop])
    assert torch.equal(panels.rows(0, rows), weight.to(dtype))
    first, stop = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    assert torch.equal(panels.rows(first, stop), weight[first:stop].to(dtype))


def test_row_r_is_lane_r_mod_16_of_panel_r_over_16():
    panels = Panels(40, 3, torch.float32, torch.device("cpu"))
    panels.put(0, torch.arange(120.0).view(40, 3))
    for row, k in itertools.product(range(40), range(3)):
        assert panels.tensor[row // 16, k, row % 16] == 3 * row + k
    assert panels.tensor[2, :, 8:].count_nonzero() == 0


@pytest.mark.parametrize(("first", "shape"), [(-1, (2, 3)), (39, (2, 3)), (0, (2, 4)), (0, (41, 3))])
def test_rows_that_do_not_fit_are_refused(first, shape):
    panels = Panels(40, 3, torch.float32, torch.device("cpu"))
    with pytest.raises(IndexError, match="do not fit a weight"):
        panels.put(first, torch.ones(shape))
    assert not panels.tensor.any()


def test_only_a_model_that_serves_has_panels():
    cpu, reference = CpuOps(), ReferenceOps()
    weight = ServingOps(cpu).matrix(20, 8, torch.bfloat16)
    assert isinstance(weight, Panels) and isinstance(cpu.matrix(20, 8, torch.bfloat16), torch.Tensor)
    assert isinstance(ServingOps(reference).matrix(20, 8, torch.bfloat16), torch.Tensor)
    with pytest.raises(TypeError, match="load the model without them"):
        rows_of(weight)
