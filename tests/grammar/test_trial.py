"""`GrammarTrial`: bad grammars are refused, and what exceeds a limit ends its process, not the caller."""

from __future__ import annotations

import json
import os

import pytest

from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import RequestError
from headrace.grammar.trial import GrammarTrial
from headrace.text.line_process import NICE


@pytest.fixture
def trial(tinyworld_checkpoint):
    made = GrammarTrial(str(tinyworld_checkpoint), 512)
    yield made
    made.close()


def of(constraint: Constraint) -> SamplingParams:
    return SamplingParams(constraint=constraint)


BOMB = json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}})


def test_good_grammars_pass_and_wrong_ones_are_named(trial):
    trial.check(of(Constraint.json_schema({"type": "object"})))
    trial.check(SamplingParams(bad_words=("no",)))
    with pytest.raises(RequestError, match="lookahead") as caught:
        trial.check(of(Constraint.regex("(?=a)b")))
    assert caught.value.param == "constraint" and caught.value.template is not None
    assert trial.pid is not None and os.getpriority(os.PRIO_PROCESS, trial.pid) >= NICE


def test_a_grammar_at_its_limit_is_refused_and_the_next_one_works(tinyworld_checkpoint):
    """A schema that takes seconds, where tenths of one are allowed."""
    hasty = GrammarTrial(str(tinyworld_checkpoint), 512, seconds=0.2)
    hasty.check(of(Constraint.choice(["a"])))
    before = hasty.pid
    with pytest.raises(RequestError, match=r"takes longer than 0\.2 s"):
        hasty.check(of(Constraint.json_schema(BOMB)))
    hasty.check(of(Constraint.choice(["a", "b"])))
    assert hasty.pid != before
    hasty.close()


@pytest.mark.parametrize(
    "params",
    [
        of(Constraint("choice", json.dumps(["yes", "no"]), prefix="yes")),
        SamplingParams(constraint=Constraint.choice(["a", "ab"]), bad_words=("b",)),
        of(Constraint.regex("")),
    ],
    ids=["begun and complete", "may end at once", "empty"],
)
def test_a_text_that_ends_within_two_masks_is_no_dead_end(trial, params):
    assert trial.check(params) is None


def test_fields_that_leave_nothing_together_are_all_named(trial):
    with pytest.raises(RequestError) as caught:
        trial.check(SamplingParams(constraint=Constraint.choice(["bad"]), bad_words=("a",)))
    error = caught.value.renamed({"constraint": "response_format"})
    assert error.param == "response_format" and str(error).startswith("response_format, bad_words cannot")


def test_a_grammar_that_fails_at_its_first_masks_is_refused(trial):
    """It compiles, and its second mask exceeds the library's limit."""
    some = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}
    with pytest.raises(RequestError, match=r"cannot be honoured|takes longer"):
        trial.check(of(Constraint.json_schema(some)))
