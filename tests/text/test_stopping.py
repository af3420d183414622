"""Stop strings with special tokens in them, shown or left out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.text.stopping import TextStream
from text.tokenizer_kit import KINDS, SPECIAL, byte_level

TOKENIZER = byte_level()
USER, ASSISTANT = (TOKENIZER.token_id(text) for text in SPECIAL[1:])


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def streamed(text: str, stop, *, skip=True, include=False, min_tokens=0):
    """Shown text, the stop string, and the number of tokens used."""
    stream = TextStream(TOKENIZER.detokenizer(skip), stop, include, min_tokens)
    shown = "".join(stream.push([token]) for token in ids_of(text)) + stream.finish()
    assert shown == stream.text
    return shown, stream.stop, stream.num_tokens


@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_stops_whether_or_not_it_is_shown(skip):
    assert streamed("abc<|assistant|>de", ["<|assistant|>"], skip=skip) == ("abc", "<|assistant|>", 4)
    assert streamed("abc<|assistant|>de", ["<|assistant|>"], skip=skip, include=True)[0] == "abc<|assistant|>"


@pytest.mark.parametrize("skip", [True, False])
def test_with_text_around_it_and_two_in_a_row(skip):
    assert streamed("abc<|user|>de", ["c<|user|>d"], skip=skip) == ("ab", "c<|user|>d", 5)
    assert streamed("ab<|user|><|assistant|>c", ["<|user|><|assistant|>"], skip=skip)[:2] == (
        "ab",
        "<|user|><|assistant|>",
    )
    shown = streamed("ab<|user|>x<|user|><|assistant|>c", ["<|user|><|assistant|>"], skip=skip)[0]
    assert shown == ("abx" if skip else "ab<|user|>x")
    assert streamed("abc<|user|>e", ["c<|user|>d"], skip=skip)[0] == ("abce" if skip else "abc<|user|>e")


@pytest.mark.parametrize("skip", [True, False])
def test_the_first_min_tokens_cannot_begin_it(skip):
    text = "a<|user|>b<|user|>c"
    assert streamed(text, ["<|user|>"], skip=skip, min_tokens=2)[1:] == ("<|user|>", 4)
    assert streamed(text, ["<|user|>"], skip=skip, min_tokens=1)[1:] == ("<|user|>", 2)


def test_a_part_of_a_token_that_is_left_out_is_no_stop_string():
    assert streamed("a<|user|>b", ["user"]) == ("ab", None, 3)
    assert streamed("a<|user|>b", ["user"], skip=False)[1] == "user"


def test_text_that_is_shown_matches_across_what_is_left_out():
    assert streamed("xa<|user|>by", ["ab", "<|user|>q"]) == ("x", "ab", 4)
    assert streamed("xa<|user|>by", ["ab"]) == ("x", "ab", 4)


def test_the_same_characters_as_ordinary_tokens_stop_too():
    stream = TextStream(TOKENIZER.detokenizer(), ["<|user|>"])
    assert stream.push([ord(c) for c in "a<|user|>b"]) + stream.finish() == "a" and stream.stop == "<|user|>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_an_incomplete_character_stands_before_it(kind, skip):
    tokenizer = KINDS[kind]()
    if kind == "metaspace":
        return
    part = {"byte_level": 0xE2, "sentencepiece": 1 + 0xE2}[kind]
    stream = TextStream(tokenizer.detokenizer(skip), ["<|user|>"])
    user = tokenizer.token_id("<|user|>")
    assert user is not None
    assert stream.push([part, user, part]) + stream.finish() == "\ufffd"
    assert stream.num_tokens == 2


def naive(items, stops, include):
    """Shown text, stop and items used, where an item is a character or a token that is left out."""
    for end in range(1, len(items) + 1):
        hits = []
        for stop in stops:
            wanted = [s for s in SPECIAL if s in stop]
            kept = [i for i in range(end) if len(items[i]) == 1 or (wanted and any(items[i] in o for o in stops))]
            for begin in range(len(kept)):
                if "".join(items[i] for i in kept[begin:]) == stop and kept[-1] == end - 1:
                    hits.append((kept[begin], stop))
        if hits:
            begin, stop = min(hits)
            shown = "".join(i for i in items[:begin] if len(i) == 1)
            return shown + (stop if include else ""), stop, end
    return "".join(i for i in items if len(i) == 1), None, len(items)


ITEMS = st.sampled_from(["a", "b", "c", *SPECIAL[1:]])


@settings(max_examples=400, deadline=None)
@given(
    items=st.lists(ITEMS, max_size=12),
    stops=st.lists(st.lists(ITEMS, min_size=1, max_size=3).map("".join), min_size=1, max_size=3),
    include=st.booleans(),
    cut=st.integers(1, 4),
)
def test_it_is_found_wherever_the_tokens_are_cut(items, stops, include, cut):
    ids = [ord(i) if len(i) == 1 else TOKENIZER.token_id(i) or 0 for i in items]
    stream = TextStream(TOKENIZER.detokenizer(), stops, include)
    expected, stop, used = naive(items, stops, include)
    shown = ""
    for begin in range(0, len(ids), cut):
        shown += stream.push(ids[begin : begin + cut])
        assert expected.startswith(shown), "text was shown that a stop string took back"
    shown += stream.finish()
    assert (shown, stream.stop, stream.num_tokens) == (expected, stop, used)
