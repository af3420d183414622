"""`GrammarMask`: which tokens may come, which must, and states that do not depend on how they were reached."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import RequestError
from headrace.grammar import grammars as module
from headrace.grammar.grammars import Grammars
from headrace.grammar.mask import GrammarMask
from headrace.text.line_process import NICE
from headrace.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "n": {"type": "integer"},
        "k": {"enum": ["cat", "cow"]},
    },
    "required": ["name", "n", "k"],
    "additionalProperties": False,
}
PARAMS = [
    SamplingParams(constraint=Constraint.json_schema(SCHEMA)),
    SamplingParams(constraint=Constraint.json_schema(SCHEMA), bad_words=("x", "on")),
    SamplingParams(constraint=Constraint.regex("[a-c]{2,9}(x|yz)*!")),
    SamplingParams(constraint=Constraint.choice(["red", "red wine", "green"])),
    SamplingParams(bad_words=("once", "th")),
]
PADDING = 40


@pytest.fixture(scope="module")
def tokenizer(tinyworld_checkpoint):
    return Tokenizer.from_folder(tinyworld_checkpoint)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, tokenizer.vocab_size + PADDING)


def mask_of(grammars: Grammars, params: SamplingParams, stops=(0,)) -> GrammarMask:
    return grammars.mask(params, stops)


def allowed(mask: GrammarMask, size: int) -> list[int]:
    words = np.zeros(-(-size // 32), np.uint32)
    mask.fill(words)
    return [int(i) for i in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]


def state(mask: GrammarMask, size: int):
    may = allowed(mask, size)
    return may, mask.ended, mask.failed, mask.forced()


@settings(max_examples=60)
@given(
    which=st.integers(0, len(PARAMS) - 1),
    choices=st.lists(st.integers(0, 10**6), min_size=1, max_size=25),
    data=st.data(),
)
def test_a_fork_is_a_fresh_mask_and_goes_its_own_way(tokenizer, grammars, which, choices, data):
    size = tokenizer.vocab_size + PADDING
    tokens: list[int] = []
    mask, fork_at = mask_of(grammars, PARAMS[which]), data.draw(st.integers(0, len(choices)))
    twin, forked = mask.fork(), 0
    for i, choice in enumerate(choices):
        if i == fork_at:
            twin, forked = mask.fork(), len(tokens)
        may = [token for token in allowed(mask, size) if token != 0]
        if mask.failed or mask.ended or not may:
            break
        tokens.append(may[choice % len(may)])
        mask.accept(tokens[-1:])
    fresh = mask_of(grammars, PARAMS[which])
    fresh.accept(tokens[:forked])
    assert state(twin, size) == state(fresh, size), "what the mask accepted later changed its fork"
    twin.accept(tokens[forked:])
    assert state(twin, size) == state(mask, size), "a fork is not the mask it came from"


@settings(max_examples=40)
@given(which=st.integers(0, len(PARAMS) - 1), choices=st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_forced_tokens_are_the_only_ones_allowed_or_another_spelling_of_the_same_text(
    tokenizer, grammars, which, choices
):
    size = tokenizer.vocab_size + PADDING
    mask = mask_of(grammars, PARAMS[which])
    for choice in choices:
        run = mask.forced()
        text = b"".join(tokenizer.token_bytes(token) for token in run)
        for token in run:
            may = allowed(mask, size)
            assert token in may
            for other in may:  # every way on is a part of the same text
                piece = tokenizer.token_bytes(other)
                assert text.startswith(piece) or piece.startswith(text)
            mask.accept((token,))
            text = text[len(tokenizer.token_bytes(token)) :]
        may = [token for token in allowed(mask, size) if token != 0]
        if mask.failed or mask.ended or not may:
            break
        mask.accept((may[choice % len(may)],))


DRAFTED = [
    *PARAMS,
    SamplingParams(constraint=Constraint.choice(["red", "red wine", "green"]), min_tokens=3),
    SamplingParams(constraint=Constraint.regex("[a-z ]{1,30}"), bad_words=("th",), allowed_token_ids=tuple(range(300))),
    SamplingParams(bad_words=("once",), min_tokens=4),
]


def follow(mask: GrammarMask, choices: list[int], size: int, stops: tuple[int, ...]) -> None:
    """Go on behind tokens that may come."""
    for choice in choices:
        may = [token for token in allowed(mask, size) if token not in stops]
        if mask.failed or mask.ended or not may:
            return
        mask.accept((may[choice % len(may)],))


@settings(max_examples=60)
@given(
    which=st.integers(0, len(DRAFTED) - 1),
    stops=st.sampled_from([(0,), (), (0, 7), (7, 12)]),
    choices=st.lists(st.integers(0, 10**6), max_size=15),
)
def test_a_token_is_allowed_where_its_bit_is_set(tokenizer, grammars, which, stops, choices):
    size = tokenizer.vocab_size + PADDING
    mask = mask_of(grammars, DRAFTED[which], stops)
    follow(mask, choices, size, stops)
    may = allowed(twin := mask.fork(), size)
    found = [token for token in range(size) if mask.allows((token,))]
    assert found == ([] if twin.failed else may)


@settings(max_examples=80)
@given(
    which=st.integers(0, len(DRAFTED) - 1),
    stops=st.sampled_from([(0,), (), (0, 7)]),
    choices=st.lists(st.integers(0, 10**6), max_size=12),
    data=st.data(),
)
def test_as_many_tokens_are_allowed_as_may_come_one_by_one(tokenizer, grammars, which, stops, choices, data):
    """Drafts that are right for a while, and then are not; the mask stays where it was."""
    size = tokenizer.vocab_size + PADDING
    mask = mask_of(grammars, DRAFTED[which], stops)
    follow(mask, choices, size, stops)
    ahead, drafts = mask.fork(), []
    for choice in data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=8)):
        may = allowed(ahead, size)
        if choice % 5 == 0 or ahead.failed:
            may = list(range(size))
        drafts.append(may[choice % len(may)])
        ahead.accept(drafts[-1:])
    before = state(mask.fork(), size)
    count, ahead = mask.allows(drafts), mask.fork()
    for i, token in enumerate(drafts[:count]):
        may = allowed(ahead, size)  # text that must come next, not at once, may be spelled in another way
        assert (token in may or (i and ahead.forced() == may)) and ahead.failed is None
        assert token not in stops or i == 0
        if token not in stops:
            ahead.accept((token,))
    special = any(token in tokenizer.special_ids for token in drafts[: count + 1])
    if count < len(drafts) and not special and not (count and drafts[0] in stops):
        assert drafts[count] in stops or drafts[count] not in allowed(ahead, size) or ahead.failed is not None
    assert state(mask, size) == before


@pytest.mark.parametrize("which", range(len(PARAMS)))
def test_padding_of_the_vocabulary_is_never_allowed(tokenizer, grammars, which):
    size = tokenizer.vocab_size + PADDING
    assert max(allowed(mask_of(grammars, PARAMS[which]), size)) < tokenizer.vocab_size


def test_an_answer_is_accepted_with_its_forced_tokens_as_the_tokenizer_spells_it(tokenizer, grammars):
    text = json.dumps({"name": "Mia", "n": 12, "k": "cow"})
    ids = tokenizer.encode(text, add_special_tokens=False)
    mask, known, forced = mask_of(grammars, PARAMS[0]), 0, 0
    while known < len(ids):
        run = mask.forced()
        assert ids[known : known + len(run)] == run
        mask.accept(run)
        known, forced = known + len(run), forced + len(run)
        mask.accept(ids[known : known + 1])
        known += 1
    assert mask.ended and not mask.failed and forced > len(ids) // 3


def test_an_end_token_is_allowed_where_the_text_may_end(tokenizer, grammars):
    size, green = tokenizer.vocab_size + PADDING, tokenizer.encode("red", add_special_tokens=False)
    mask = mask_of(grammars, PARAMS[3], stops=(0, 7))
    assert not {0, 7} & set(allowed(mask, size))
    mask.accept(green)
    assert {0, 7} <= set(allowed(mask, size)) and not mask.ended
    ignoring = mask_of(grammars, PARAMS[3], stops=())
    ignoring.accept(green)
    assert 0 not in allowed(ignoring, size)
    assert ignoring.failed is None


def test_before_min_tokens_the_end_is_a_dead_end(tokenizer, grammars):
    params = SamplingParams(constraint=Constraint.choice(["no"]), min_tokens=9, max_tokens=20)
    mask = mask_of(grammars, params)
    mask.accept(tokenizer.encode("no", add_special_tokens=False))
    assert mask.failed is not None and mask.failed.startswith("constraint, min_tokens: ")
    assert not mask.ended


def test_fields_that_leave_no_token_fail_by_their_names(tokenizer, grammars):
    size = tokenizer.vocab_size + PADDING
    params = SamplingParams(constraint=Constraint.regex("[a-z]+"), allowed_token_ids=tuple(tokenizer.encode("7")))
    mask = mask_of(grammars, params)
    assert mask.forced() == []
    assert len(allowed(mask, size)) >= size and mask.failed is not None
    assert mask.failed.startswith("constraint, allowed_token_ids: ")


def test_nothing_is_forced_that_another_field_forbids(tokenizer, grammars):
    choice = Constraint.choice(["green"])
    run = mask_of(grammars, SamplingParams(constraint=choice)).forced()
    assert tokenizer.decode(run) == "green"
    banned = mask_of(grammars, SamplingParams(constraint=choice, bad_words=("een",)))
    assert tokenizer.decode(banned.forced()) != "green"
    held = tuple(token for token in range(tokenizer.vocab_size) if token != run[0])
    assert mask_of(grammars, SamplingParams(constraint=choice, allowed_token_ids=held)).forced() == []


def test_the_prefix_of_a_constraint_counts(tokenizer, grammars):
    begun = Constraint("choice", json.dumps(["red", "green"]), prefix="gr")
    mask = mask_of(grammars, SamplingParams(constraint=begun))
    assert tokenizer.decode(mask.forced()) == "een"
    with pytest.raises(RequestError, match="does not satisfy"):
        mask_of(grammars, SamplingParams(constraint=Constraint("choice", json.dumps(["red"]), prefix="blue")))


def test_compiled_grammars_are_kept_and_the_oldest_are_dropped(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    made = Grammars(tokenizer, tokenizer.vocab_size)
    one, two, three = (SamplingParams(constraint=Constraint.choice([text])) for text in ("a", "b", "c"))
    known = []
    for params in (one, two, one, three, one, two):
        known.append(made.ready(params))
        made.mask(params, ())
    assert known == [False, False, True, False, True, False], "the one that was used last is kept"
    assert (made.hits, made.misses) == (2, 4)


def test_text_that_names_a_special_token_is_text(tokenizer, grammars):
    """`<|end|>` is a special token of this vocabulary, and here the value of a constant."""
    constant = SamplingParams(constraint=Constraint.json_schema({"const": "x<|end|>y<|user|>"}))
    mask = mask_of(grammars, constant)
    run = mask.forced()
    assert not tokenizer.special_ids & set(run)
    assert b"".join(map(tokenizer.token_bytes, run)) == b'"x<|end|>y<|user|>"'
    mask.accept(run)
    assert mask.ended and mask.failed is None


def test_text_that_the_tokenizer_would_change_is_spelled_by_its_longest_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "spell", lambda self, text: self.encode(text.upper(), add_special_tokens=False))
    made = Grammars(tokenizer, tokenizer.vocab_size)
    run = made.mask(SamplingParams(constraint=Constraint.choice(["lower case"])), ()).forced()
    assert b"".join(map(tokenizer.token_bytes, run)) == b"lower case"


def test_preparing_looks_at_the_grammar_alone(grammars):
    """Ids that no vocabulary has are refused where the request is added."""
    odd = SamplingParams(constraint=Constraint.choice(["odd", "even"]), allowed_token_ids=(10**9,))
    assert grammars.prepare(odd).result() is None


def test_a_grammar_is_compiled_on_a_thread_that_gives_way(tokenizer):
    made = Grammars(tokenizer, tokenizer.vocab_size)
    assert made.prepare(PARAMS[0]).result() is None and made.ready(PARAMS[0])
    [thread] = made._thread._threads
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert thread.native_id is not None
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == min(own + NICE, 19)
    with pytest.raises(RequestError, match="lookahead"):
        made.prepare(SamplingParams(constraint=Constraint.regex("(?=a)b"))).result()


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    endless = Tokenizer(tokenizer._backend, {}, None)
    with pytest.raises(RequestError, match="end token"):
        Grammars(endless, endless.vocab_size).mask(PARAMS[0], ())
