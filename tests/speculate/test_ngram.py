from hypothesis import given
from hypothesis import strategies as st

from headrace.speculate import ngram
from headrace.speculate.ngram import NgramProposer
from speculate.proposer_kit import generate, request_of

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def naive(tokens, most):
    """The draft and the match by scanning all places, the last one first."""
    known = len(tokens)
    for size in range(min(ngram.LONGEST, known - 1), ngram.SHORTEST - 1, -1):
        for end in range(known - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[known - size :]:
                match = 0
                while match < min(ngram.MATCH_BOUND, end) and tokens[end - 1 - match] == tokens[known - 1 - match]:
                    match += 1
                longer = list(tokens)
                for i in range(most):
                    longer.append(longer[end + i])
                return longer[known:], match
    return [], 0


@given(TOKENS, TOKENS, st.integers(1, 9), st.integers(1, 7))
def test_it_finds_what_a_scan_finds(prompt, output, most, every):
    proposer, request = NgramProposer(), request_of(0, prompt)
    for i, token in enumerate(output):
        assert proposer.propose(request, most) == naive(request.token_ids, most)
        request.token_ids.append(token)
        if i % every == 0:
            proposer.learn(request)
    assert proposer.propose(request, most) == naive(request.token_ids, most)


@given(st.lists(st.integers(0, 2), min_size=8, max_size=80), st.integers(1, 9), st.data())
def test_a_long_prompt_is_indexed_in_parts(prompt, part, data):
    before, ngram.BACKLOG = ngram.BACKLOG, part
    try:
        proposer, request = NgramProposer(), request_of(0, prompt)
        for _ in range(len(prompt) // part + 2):
            proposer.learn(request)
            if data.draw(st.booleans()):
                generate(proposer, request, [data.draw(st.integers(0, 2))])
        assert proposer.propose(request, 4) == naive(request.token_ids, 4)
    finally:
        ngram.BACKLOG = before


def test_a_loop_goes_on_at_any_length():
    proposer, request = NgramProposer(), request_of(0, [9, 1, 2, 3, 1, 2, 3])
    assert proposer.propose(request, 8) == ([1, 2, 3, 1, 2, 3, 1, 2], 3)
    assert proposer.propose(request, 0) == ([], 0)


def test_matches_are_measured_up_to_a_bound():
    proposer, request = NgramProposer(), request_of(0, [5] * 200)
    assert proposer.propose(request, 3) == ([5, 5, 5], ngram.MATCH_BOUND)


@given(TOKENS, TOKENS, TOKENS, st.integers(0, 60))
def test_tokens_that_are_cut_off_are_forgotten(prompt, output, more, keep):
    proposer, request = NgramProposer(), request_of(0, prompt)
    generate(proposer, request, output)
    del request.token_ids[len(prompt) + keep :]
    assert proposer.propose(request, 5) == naive(request.token_ids, 5)
    generate(proposer, request, more)
    assert proposer.propose(request, 5) == naive(request.token_ids, 5)


def test_a_resumed_request_and_one_that_ends():
    proposer = NgramProposer()
    resumed = request_of(0, [1, 2, 3, 4], output=[8, 1, 2])
    assert proposer.propose(resumed, 2) == ([3, 4], 2) and len(proposer) == 1
    proposer.finish(request_of(1, [1]))
    proposer.finish(resumed)
    assert len(proposer) == 0
