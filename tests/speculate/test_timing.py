"""The time of steps, by a clock that the test sets."""

import pytest

from headrace.speculate.timing import StepTimer


class Steps:
    """A timer, and calls at given times."""

    def __init__(self):
        self.now = 0.0
        self.timer = StepTimer(lambda: self.now)

    def at(self, now, call, *arguments):
        self.now = now
        return getattr(self.timer, call)(*arguments)


def test_passes_are_not_of_the_step():
    steps = Steps()
    steps.at(1.0, "planned")
    steps.at(3.0, "passed", 1.5)
    steps.at(4.0, "began", 8)
    assert steps.at(9.0, "ended", 8, 0.0) == 8.0 - 1.5
    steps.at(20.0, "began", 8)
    assert steps.at(21.0, "ended", 8, 0.0) == 1.0, "the next step has none of them"


@pytest.mark.parametrize(("planned", "seconds"), [(12.0, 10.0), (14.0, 6.0)])
def test_the_host_s_work_between_steps_counts_and_idleness_does_not(planned, seconds):
    steps = Steps()
    steps.at(0.0, "began", 4)
    assert steps.at(10.0, "ended", 4, 10.0) == 10.0
    steps.at(planned, "planned")
    steps.at(15.0, "began", 4)
    assert steps.at(20.0, "ended", 4, 10.0) == seconds


def test_of_two_in_flight_the_second_starts_when_the_first_has_ended_and_keeps_its_passes():
    steps = Steps()
    steps.at(0.0, "began", 4)
    steps.at(1.0, "planned")
    steps.at(2.0, "passed", 1.0)
    steps.at(2.0, "began", 8)
    assert steps.at(10.0, "ended", 4, 0.0) == 10.0
    assert steps.at(13.0, "ended", 8, 0.0) == 3.0


def test_a_step_that_was_given_up_or_never_began_has_no_time():
    steps = Steps()
    assert steps.at(1.0, "ended", 3, 0.0) is None
    steps.at(2.0, "began", 4)
    steps.at(3.0, "began", 6)
    assert steps.at(5.0, "ended", 6, 0.0) == 2.0
