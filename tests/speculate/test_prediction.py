from hypothesis import given
from hypothesis import strategies as st

from headrace.speculate import prediction
from headrace.speculate.prediction import PredictionProposer
from speculate.proposer_kit import generate, request_of

TEXT = tuple(range(100, 160))


def after(output, predicted=TEXT, most=4):
    """What is proposed behind an output."""
    proposer, request = PredictionProposer(), request_of(0, [1, 2], prediction=predicted)
    generate(proposer, request, output)
    return proposer.propose(request, most)


def test_it_follows_the_prediction_from_its_start():
    assert after([]) == ([100, 101, 102, 103], 0)
    assert after([100, 101, 102]) == ([103, 104, 105, 106], 3)
    assert after(TEXT[:50]) == (list(TEXT[50:54]), prediction.MATCH_BOUND)
    assert after(TEXT[:58]).token_ids == [158, 159]
    assert after(TEXT) == ([], 0)


def test_a_replaced_token_costs_one_step():
    assert after([100, 101, 7]) == ([103, 104, 105, 106], 0)
    assert after([100, 101, 7, 103]) == ([104, 105, 106, 107], 1)


def test_behind_a_second_difference_it_proposes_nothing_until_two_tokens_agree_close_by():
    assert after([100, 101, 7, 8]) == ([], 0)
    assert after([100, 101, 7, 8, 9, 102]) == ([], 0)
    assert after([100, 101, 7, 8, 9, 102, 103]) == ([104, 105, 106, 107], 2)  # inserted tokens
    assert after([100, 101, 120, 121]) == ([122, 123, 124, 125], 2)  # tokens left out


def test_far_away_four_tokens_must_agree():
    text = tuple(range(1000, 1400))
    assert after([1000, 1300, 1301, 1302], text) == ([], 0)
    assert after([1000, 1300, 1301, 1302, 1303], text) == ([1304, 1305, 1306, 1307], 4)
    back = [*text[300:304], *text[10:13]]
    assert after(back, text) == ([], 0)
    assert after([*back, text[13]], text) == (list(text[14:18]), 4)


def test_the_nearest_place_behind_the_difference_comes_first():
    text = (1, 2, 3, 4, 50, 1, 2, 3, 4, 60, 1, 2, 3, 4, 70)
    assert after([*text[:5], 99, 98, 1, 2], text).token_ids == [3, 4, 60, 1]
    assert after([*text[:10], 99, 98, 1, 2], text).token_ids == [3, 4, 70]


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.lists(st.integers(0, 5), max_size=60),
    st.integers(1, 9),
    st.integers(0, 40),
)
def test_how_often_it_learns_does_not_matter(predicted, output, every, keep):
    often, rarely = PredictionProposer(), PredictionProposer()
    first, second = (request_of(0, [3], prediction=tuple(predicted)) for _ in range(2))
    generate(often, first, output)
    generate(rarely, second, output, every)
    resumed = request_of(0, [3], output, prediction=tuple(predicted))
    proposal = often.propose(first, 5)
    assert proposal == rarely.propose(second, 5) == PredictionProposer().propose(resumed, 5)
    for request in (first, resumed):
        del request.token_ids[1 + keep :]
    assert often.propose(first, 5) == PredictionProposer().propose(resumed, 5)


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=50, unique=True), st.data())
def test_an_edit_is_followed_again_four_tokens_later(text, data):
    cut = data.draw(st.integers(0, len(text)))
    gap = data.draw(st.integers(0, 5))
    inserted = data.draw(st.lists(st.integers(2**20 + 1, 2**20 + 9), max_size=5))
    rest = text[cut + gap :]
    for known in range(prediction.FAR, len(rest)):
        assert after([*text[:cut], *inserted, *rest[:known]], tuple(text)).token_ids == rest[known : known + 4]


def test_ids_above_all_characters_are_followed():
    text = tuple(2**30 + i for i in range(20))
    assert after([text[0], 5, 5, *text[5:7]], text).token_ids == list(text[7:11])


def test_requests_without_a_prediction_and_those_that_end_leave_nothing():
    proposer = PredictionProposer()
    assert proposer.propose(request_of(0, [1]), 4) == ([], 0) and len(proposer) == 0
    request = request_of(1, [1], prediction=TEXT)
    proposer.learn(request)
    assert len(proposer) == 1
    proposer.finish(request)
    proposer.finish(request)
    assert len(proposer) == 0
