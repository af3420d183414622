"""Every token's place in the text, and the bytes that it stands for, with any tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.text.places import places_of_ids, places_of_text
from headrace.text.tokenizer import Tokenizer
from text.tokenizer_kit import KINDS, SPECIAL

FOLDERS = ("checkpoints/stories260K", "tokenizers/ort_ext/phi-2", "tokenizers/ort_ext/phi-3-mini")


@pytest.fixture(scope="module", params=[*KINDS, *FOLDERS])
def tokenizer(request) -> Tokenizer:
    if request.param in KINDS:
        return KINDS[request.param]()
    return Tokenizer.from_folder(request.getfixturevalue("data_dir") / request.param)


def check(tokenizer, text, ids, places, hidden=()):
    """Places never go back, stay in the text, and the tokens that can be shown stand there."""
    offsets = [offset for offset, _ in places]
    assert len(places) == len(ids) and offsets == sorted(offsets) and all(0 <= o <= len(text) for o in offsets)
    for token_id, (offset, opens) in zip(ids, places):
        token = tokenizer.token_text(token_id, opens)
        # A byte that a later one makes invalid is shown as U+FFFD.
        if "\ufffd" not in token and token_id not in hidden and text[offset : offset + 1] != "\ufffd":
            assert text[offset : offset + len(token)] == token


CHARACTERS = st.sampled_from([*"the dayOne nF.", "é", "漢", "👍", "👩‍👧", "e\u0301"])
TEXTS = st.lists(CHARACTERS, max_size=30).map("".join)
PROMPTS = st.lists(st.one_of(CHARACTERS, st.sampled_from(SPECIAL)), max_size=30).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=PROMPTS, special=st.booleans())
def test_tokens_of_a_text_stand_in_it(tokenizer, text, special):
    ids, spans = tokenizer.encode_with_spans(text, special)
    assert ids == tokenizer.encode(text, special)
    places = places_of_text(tokenizer, text, ids, spans)
    if tokenizer.token_id("<unk>") not in ids:
        check(tokenizer, text, ids, places, hidden=[tokenizer.token_id(special) for special in SPECIAL])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_tokens_of_ids_stand_in_their_text(tokenizer, data):
    low = st.integers(0, min(262, tokenizer.vocab_size - 1))
    ids = data.draw(st.lists(st.one_of(low, st.integers(0, tokenizer.vocab_size - 1)), max_size=20))
    text, places = places_of_ids(tokenizer, ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    check(tokenizer, text, ids, places)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), prompt=PROMPTS, skip=st.booleans())
def test_an_output_continues_its_prompt(tokenizer, data, prompt, skip):
    low = st.integers(0, min(262, tokenizer.vocab_size - 1))
    ids = data.draw(st.lists(st.one_of(low, st.integers(0, tokenizer.vocab_size - 1)), max_size=12))
    stream = tokenizer.detokenizer(skip, tokenizer.encode(prompt))
    places = []
    for token_id in ids:
        places.append(stream.place(token_id))
        stream.push((token_id,))
    stream.flush()
    check(tokenizer, stream.text, ids, places, hidden=stream.skipped_tokens())


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_the_bytes_of_tokens_add_up_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.token_id("<unk>") in ids:
        return
    shown, places = places_of_ids(tokenizer, ids)
    assert b"".join(tokenizer.token_bytes(i, p.opens) for i, p in zip(ids, places)) == shown.encode()


@pytest.mark.parametrize(
    ("kind", "text", "tokens", "offsets"),
    [
        ("sentencepiece", "One day", ["<s>", "One", " day"], [0, 0, 3]),
        ("sentencepiece", "Fe 👍é", ["<s>", "", "F", "e", " ", *4 * ["\ufffd"], "é"], [0, 0, 0, 1, 2, 3, 3, 3, 3, 4]),
        ("byte_level", "the the", ["the", " the"], [0, 3]),
        ("byte_level", "a 👍é", ["a", " \ufffd", "\ufffd", "\ufffd", "é"], [0, 1, 2, 2, 3]),
        ("byte_level", "a<s>b", ["a", "<s>", "b"], [0, 1, 4]),
    ],
)
def test_a_start_token_a_first_space_and_split_characters(kind, text, tokens, offsets):
    tokenizer = KINDS[kind]()
    ids, spans = tokenizer.encode_with_spans(text)
    places = places_of_text(tokenizer, text, ids, spans)
    assert [tokenizer.token_text(i, p.opens) for i, p in zip(ids, places)] == tokens
    assert [place.offset for place in places] == offsets
