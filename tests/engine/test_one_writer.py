"""The guard of `writers.py` detects a write from another module; every other test of this folder runs under it."""

import types

import pytest

from headrace.engine.schedule.edits import EditState
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams


@pytest.mark.parametrize(
    "write",
    [
        "request.num_scored = 3",
        "request.token_ids.append(1)",
        "request.token_ids += [1]",
        "del request.token_ids[1:]",
        "request.spec_token_ids.insert(0, 1)",
        "request.stop_ids[4] = None",
        "request.stop_ids.update({4: None})",
        "request.spec_token_ids = [4]",
        "request.edits.append(4)",
        "request.edits.current(2)",
    ],
)
def test_a_write_from_another_module_is_detected(write):
    other = types.ModuleType("headrace.engine.schedule.slices")
    request = Request(1, [1, 2, 3], SamplingParams(presence_penalty=1.0))
    request.edits = EditState(request.params, [], [])
    with pytest.raises(AssertionError, match=r"schedule\.slices changes a request"):
        exec(write, other.__dict__ | {"request": request})
