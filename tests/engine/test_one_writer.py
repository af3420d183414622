"""The guard of `writers.py` sees a write from another module; that no other test trips over it is the proof."""

import types

import pytest

from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams


@pytest.mark.parametrize(
    "write",
    ["request.num_scored = 3", "request.token_ids.append(1)", "request.token_ids += [1]", "del request.token_ids[1:]"],
)
def test_a_write_from_another_module_is_seen(write):
    other = types.ModuleType("headrace.engine.schedule.slices")
    with pytest.raises(AssertionError, match=r"schedule\.slices changes"):
        exec(write, other.__dict__ | {"request": Request(1, [1, 2, 3], SamplingParams())})
