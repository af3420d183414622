import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.key import CacheKey
from headrace.errors import ConfigError
from headrace.speculate import suffix
from headrace.speculate.suffix import FEWEST_NODES, SuffixProposer
from headrace.speculate.trie import DEPTH, SuffixTrie
from speculate.proposer_kit import generate, request_of, say

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=1, max_size=4)
HERE = CacheKey()


def naive_counts(texts):
    return Counter(
        tuple(text[i : i + size]) for text in texts for size in range(1, DEPTH + 1) for i in range(len(text) - size + 1)
    )


def check_counts(trie, texts):
    """Counts are exact. A sequence without one occurred at most once, below a leaf."""
    trie.check_integrity()
    for sequence, count in naive_counts(texts).items():
        found = trie.count(HERE, sequence)
        if found != count:
            assert (found, count) == (0, 1) and trie.count(HERE, sequence[:-1]) <= 1


@given(TEXTS, st.randoms(use_true_random=False))
def test_counts_of_texts_that_grow_side_by_side(texts, order):
    trie = SuffixTrie()
    strands = [trie.open(HERE) for _ in texts]
    steps = [i for i, text in enumerate(texts) for _ in text]
    order.shuffle(steps)
    for i in steps:
        trie.extend(strands[i], texts[i][len(strands[i].token_ids)])
    check_counts(trie, texts)


@given(st.integers(0, 999), st.integers(1, 150), st.integers(1, 90), st.integers(1, 40))
def test_a_long_prompt_is_counted_once_in_parts(seed, length, portion, stretch):
    half = random.Random(seed).choices(range(3), k=length // 2)
    prompt = [*half, 7, *half]  # each part adds nodes, so all are counted
    before = suffix.PORTION, suffix.STRETCH
    suffix.PORTION, suffix.STRETCH = portion, stretch
    try:
        proposer, request = SuffixProposer(1 << 16), request_of(0, prompt)
        for _ in range((DEPTH + 2) * (len(prompt) + 1)):
            proposer.learn(request)
        check_counts(proposer._newer, [prompt])
        assert proposer._readers[0].backlog is None
    finally:
        suffix.PORTION, suffix.STRETCH = before


def test_the_choices_of_a_prompt_count_it_once():
    proposer, prompt = SuffixProposer(), list(range(200))
    for i in range(3):
        request = request_of(i, prompt, parent_id=0 if i else None)
        for _ in range(200):
            proposer.learn(request)
    assert proposer._newer.count(HERE, [5]) == 1 and proposer._newer.count(HERE, [199]) == 3


def test_a_part_that_is_known_ends_the_counting_of_a_prompt():
    proposer, system = SuffixProposer(), list(range(500))
    for i in range(4):
        request = request_of(i, [*system, *range(1000 * (i + 1), 1000 * (i + 1) + 30)])
        for _ in range(400):
            proposer.learn(request)
    assert [proposer._newer.count(HERE, [token]) for token in (5, 499)] == [2, 4]


def test_one_sample_drafts_for_the_next():
    proposer, prompt = SuffixProposer(), [1, 2, 3]
    story = random.Random(0).choices(range(50), k=100)
    say(proposer, 0, prompt, story)
    request = request_of(1, prompt)
    assert proposer.propose(request, 4) == (story[:4], 3)
    generate(proposer, request, story[:40])
    assert proposer.propose(request, 8) == (story[40:48], DEPTH - 1)
    running = request_of(2, prompt)
    generate(proposer, request, [77, 78, 79])
    generate(proposer, running, [*story[:40], 77])
    assert proposer.propose(running, 2).token_ids == [78, 79]  # of a request that runs


def test_the_most_frequent_continuation_is_drafted_while_it_is_likely():
    proposer = SuffixProposer()
    for i in range(12):
        say(proposer, i, [1, 2], [3, 4, 5 if i % 4 else 6, 20 + i])
    request = request_of(99, [1, 2])
    proposal = proposer.propose(request, 6)
    assert proposal.token_ids[:3] == [3, 4, 5] and proposal.match == 2
    assert len(proposal.token_ids) < 5  # each fourth token was another


def play(proposer, texts, salt, seed, between):
    """Requests side by side, proposals before each token; `between` happens between the tokens."""
    rng = random.Random(seed)
    requests = [request_of(i, [1, 2], salt=salt) for i in range(len(texts))]
    left = [list(text) for text in texts]
    proposals = []
    while any(left):
        i = rng.choice([i for i, text in enumerate(left) if text])
        proposals.append(proposer.propose(requests[i], 5))
        generate(proposer, requests[i], [left[i].pop(0)])
        between()
    for request in requests:
        proposer.finish(request)
    return proposals


@given(TEXTS, TEXTS, st.integers(0, 9))
def test_a_namespace_sees_nothing_of_another(texts, others, seed):
    alone = play(SuffixProposer(), texts, "a", seed, lambda: None)
    assert alone == play(SuffixProposer(), texts, "a", seed, lambda: None)
    shared, ids = SuffixProposer(), iter(range(100, 9999))

    def speak():
        for text in others:
            say(shared, next(ids), [1, 2], text, salt="b")

    assert alone == play(shared, texts, "a", seed, speak)
    shared.check_integrity()
    assert len(shared) == 0


@given(TEXTS, st.integers(2, 9))
def test_how_often_it_learns_does_not_matter(texts, every):
    found = []
    for step in (1, every):
        proposer, proposals = SuffixProposer(), []
        for i, text in enumerate(texts):
            request = request_of(i, [1, 2])
            proposer.learn(request)
            generate(proposer, request, text, step)
            proposals.append(proposer.propose(request, 5))
            proposer.finish(request)
        found.append(proposals)
    assert found[0] == found[1]


STREAMS = ["new", "loop", "short", "salts", "alike", "versions", "prompts"]


@pytest.mark.parametrize("kind", STREAMS)
def test_there_are_never_more_nodes_than_allowed(kind):
    proposer, rng = SuffixProposer(FEWEST_NODES), random.Random(1)
    story = rng.choices(range(9), k=60)
    long_lived = request_of(10**6, [1, 2, 3])
    for i in range(60):
        output = {"loop": [1, 2, 1] * 20, "short": [i], "alike": story}.get(kind) or rng.choices(range(3000), k=60)
        prompt = rng.choices(range(3000), k=300) if kind == "prompts" else [7, 8]
        version = i // 3 if kind == "versions" else 0
        request = request_of(i, prompt, salt=str(i) if kind == "salts" else None, version=version)
        for token in output:
            proposer.propose(request, 8)
            generate(proposer, request, [token])
            assert proposer.num_nodes <= proposer.max_nodes
        proposer.finish(request)
        generate(proposer, long_lived, [i % 7])
        proposer.check_integrity()
        assert len(proposer._dropped) < 8 and len(proposer) == 1
        tokens = proposer._newer.num_tokens + proposer._older.num_tokens
        assert tokens <= suffix.TOKENS_PER_NODE * proposer.max_nodes + len(output)
    proposer.finish(long_lived)
    assert len(proposer) == 0


def test_a_text_in_use_survives_the_change_of_tries():
    proposer, rng = SuffixProposer(FEWEST_NODES), random.Random(3)
    story = rng.choices(range(1000), k=60)
    say(proposer, 0, [1, 2], story)
    turn, i = proposer._turn, 1
    while proposer._turn == turn:
        say(proposer, i, [1, 2], rng.choices(range(2000, 9000), k=20))
        i += 1
    request = request_of(i, [1, 2])
    generate(proposer, request, story[:10])
    assert proposer.propose(request, 4).token_ids == story[10:14]


def test_proposals_stay_right_when_other_requests_change_the_tries():
    """A request that waits through many changes has no nodes of dropped tries."""
    proposer, rng = SuffixProposer(FEWEST_NODES), random.Random(4)
    waiting = request_of(0, [1, 2], salt="a")
    generate(proposer, waiting, rng.choices(range(50), k=40))
    for i in range(1, 100):
        say(proposer, i, [1, 2], rng.choices(range(2000, 3000), k=40), salt="b")
        if i % 30 == 0:
            assert all(token < 50 for token in proposer.propose(waiting, 8).token_ids)
            generate(proposer, waiting, [rng.randrange(50)])
            proposer.check_integrity()
    assert proposer._turn > 5
    proposer.check_integrity()


def test_new_weights_drop_what_older_ones_said():
    proposer = SuffixProposer()
    say(proposer, 0, [1, 2], [3, 4, 5])
    before = proposer.num_nodes
    running = request_of(1, [1, 2])
    assert proposer.propose(running, 3).token_ids == [3, 4, 5]
    running.cache_key = running.cache_key._replace(weights_version=1)
    assert proposer.propose(running, 3) == ([], 0)
    assert before < proposer.num_nodes <= 2 * before + 20 and not proposer._older.size
    generate(proposer, running, [8, 9])
    proposer.finish(running)
    other = request_of(2, [1, 2], version=1)
    assert proposer.propose(other, 2).token_ids == [8, 9]
    proposer.check_integrity()


def test_tokens_that_are_cut_off():
    proposer, request = SuffixProposer(), request_of(0, [1, 2])
    generate(proposer, request, [3, 4, 5, 6, 7])
    del request.token_ids[4:]
    proposer.finish(request)
    assert len(proposer) == 0
    other = request_of(1, [1, 2])
    generate(proposer, other, [3, 4, 5, 6])
    del other.token_ids[5:]
    assert proposer.propose(other, 1).token_ids == [6]
    generate(proposer, other, [8])
    proposer.check_integrity()
    proposer.finish(other)


def test_a_resumed_request_counts_its_last_tokens_at_once_and_the_rest_later():
    proposer, output = SuffixProposer(), list(range(1000, 1500))
    request = request_of(0, [1, 2], output)
    proposer.learn(request)
    counted = [proposer._newer.count(HERE, [token]) for token in (1, 1499 - suffix.BURST, 1499)]
    assert counted[0] == 0 and counted[2] == 1
    for _ in range(400):
        proposer.learn(request)
    assert proposer._newer.count(HERE, [1]) == proposer._newer.count(HERE, [1250]) == 1
    proposer.check_integrity()


def test_a_finish_learns_what_it_was_not_told():
    proposer, request = SuffixProposer(), request_of(0, [1, 2])
    proposer.learn(request)
    request.token_ids += [3, 4]
    proposer.finish(request)
    proposer.finish(request_of(5, [9]))
    assert proposer.propose(request_of(1, [1, 2]), 2).token_ids == [3, 4]


def test_too_few_nodes_are_refused():
    with pytest.raises(ConfigError, match="at least 1024"):
        SuffixProposer(100)
