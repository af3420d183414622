"""How many sampled tokens stand, given the drafts of a slice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.schedule.accept import accepted, draft_tokens
from headrace.engine.schedule.plan import SAMPLE, Slice
from headrace.engine.schedule.sampling import SamplingParams

TOKENS = st.lists(st.integers(0, 2), max_size=6)


def slice_of(token_ids, targets):
    return Slice(1, 0, token_ids, [1], targets, SamplingParams(), 0, 0)


@pytest.mark.parametrize(
    "token_ids,samples,sampled,count",
    [
        ([7, 8, 9], 0, [], 0),  # the middle of a prompt
        ([7], 1, [4], 1),  # a decode
        ([7, 4, 5], 3, [4, 5, 6], 3),  # both drafts are right: the third token comes with them
        ([7, 4, 9], 3, [4, 5, 6], 2),  # the second draft is wrong: what follows it is not sampled from this prefix
        ([7, 9, 5], 3, [4, 5, 6], 1),
    ],
)
def test_a_token_stands_while_the_drafts_before_it_are_right(token_ids, samples, sampled, count):
    assert accepted(slice_of(token_ids, [SAMPLE] * samples), sampled) == count


@given(TOKENS, TOKENS, st.integers(0, 4), st.data())
def test_what_stands_is_what_sampling_one_by_one_gives(prompt, drafts, scored, data):
    """Against a model that samples a function of the whole prefix, one token at a time."""
    table = data.draw(st.lists(st.integers(0, 2), min_size=7, max_size=7))

    def sample(prefix):
        return table[(sum(prefix) + 3 * len(prefix)) % 7]

    known = [1, *prompt]
    targets = known[1:][-scored:] if scored else []
    s = slice_of([*known, *drafts], [*targets, *[SAMPLE] * (len(drafts) + 1)])
    sampled = [sample([*known, *drafts[:i]]) for i in range(len(drafts) + 1)]
    assert draft_tokens(s) == drafts
    count = accepted(s, sampled)
    serial = list(known)
    for _ in range(count):
        serial.append(sample(serial))
    assert serial[len(known) :] == sampled[:count]
    assert count == len(drafts) + 1 or drafts[count - 1] != sampled[count - 1]
