from headrace.speculate.forced import ForcedProposer
from speculate.proposer_kit import request_of


class Mask:
    def forced(self):
        return [4, 5, 6]


def test_forced_text_is_a_draft_where_the_engine_samples_it():
    proposer = ForcedProposer()
    request = request_of(0, [1], jump_forward=False)
    assert proposer.propose(request, 4) == ([], 0)
    request.mask = Mask()
    proposer.learn(request)
    assert proposer.propose(request, 2) == ([4, 5], 0) and proposer.propose(request, 9).token_ids == [4, 5, 6]
    proposer.finish(request)


def test_with_jump_forward_nothing_is_left_to_draft():
    request = request_of(0, [1])
    request.mask = Mask()
    assert ForcedProposer().propose(request, 4) == ([], 0)
