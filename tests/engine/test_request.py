import pytest

from headrace.cache.key import CacheKey
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import RequestError


def test_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match="no tokens"):
        Request(0, [], SamplingParams())


def test_known_tokens_and_what_remains_of_them():
    request = Request(0, [1, 2, 3], SamplingParams(max_tokens=9), output_token_ids=[4])
    assert request.prompt_token_ids == [1, 2, 3] and request.output_token_ids == [4]
    assert request.num_tokens == 4 and request.num_output_tokens == 1 and request.remaining() == 4
    assert [(s.owner, s.start, s.blocks) for s in request.segments] == [(0, 0, [])]


def test_siblings_differ_in_their_choice_alone():
    root = Request(4, [1, 2], SamplingParams(n=2), seed=9, priority=1, cache_key=CacheKey(salt="x"))
    other = root.sibling(5, 1)
    assert (other.parent_id, other.group_id, other.seed, other.choice) == (4, 4, 9, 1)
    assert other.prompt_token_ids == [1, 2] and other.cache_key == CacheKey(salt="x")


def test_top_is_what_sampled_and_scored_tokens_need():
    assert Request(0, [1], SamplingParams()).top is None
    assert Request(0, [1], SamplingParams(logprobs=3)).top == 3
    assert Request(0, [1], SamplingParams(logprobs=3, prompt_logprobs=5)).top == 5
    assert Request(0, [1], SamplingParams(logprobs=3, prompt_logprobs=5), choice=1).top == 3
