"""Where a step's drafts stand in what it gives: behind the forced tokens that come with it."""

import random

import pytest

from engine.guesses import alone, drive, make
from engine.test_drafts import All
from engine.test_masks import copy_of
from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams


class Noting(All):
    """Notes how many tokens were known before each step's drafts."""

    def __init__(self, seed, outputs):
        super().__init__(seed, outputs, ["right"])
        self.known = []

    def learn(self, request, drafts, accepted):
        if drafts:
            self.known.append(self.proposed[request.request_id][0])
        super().learn(request, drafts, accepted)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_drafts_stand_behind_the_tokens_that_were_known(logprobs):
    behind = accepted = 0
    for key in range(60):
        params = SamplingParams(max_tokens=30, logprobs=logprobs, constraint=Constraint.regex(str(key)))
        request = Request(0, [1, 2, 3], params)
        guesses, given = Noting(key, {0: list(alone(request)[0])}), 3
        for update in drive(make(guesses), [copy_of(request)], random.Random(0)):
            if update.drafted:
                assert given + update.drafts_at == guesses.known.pop(0)
                behind += update.drafts_at > 0
                accepted += update.accepted
            given += len(update.token_ids)
        assert guesses.known == []
    assert accepted > 20 and behind > 5
