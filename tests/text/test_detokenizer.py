"""What is streamed never changes and adds up to the whole decoding; stop strings straddle anything."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from headrace.text.detokenizer import Detokenizer, PieceTable
from headrace.text.stopping import StopChecker, TextStream
from headrace.text.tokenizer import Tokenizer

FOLDERS = ("checkpoints/stories260K", "tokenizers/ort_ext/phi-2", "tokenizers/ort_ext/phi-3-mini")
WINDOW = "metaspace"
"""A tokenizer whose decoder is none of the two known kinds."""


def metaspace() -> Tokenizer:
    words = ["▁", "▁the", "▁cat", "s", "▁é", "漢", "<unk>"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


@pytest.fixture(scope="module", params=[*FOLDERS, WINDOW])
def tokenizer(request) -> Tokenizer:
    if request.param == WINDOW:
        return metaspace()
    return Tokenizer.from_folder(request.getfixturevalue("data_dir") / request.param)


def token_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any ids, with those of bytes, of specials and beyond the vocabulary often among them."""
    low = st.integers(0, min(260, tokenizer.vocab_size - 1))
    return st.lists(st.one_of(low, st.integers(0, tokenizer.vocab_size + 2)), max_size=24)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pushes_and_flush_add_up_to_decoding_everything(tokenizer, data, skip):
    ids = data.draw(token_ids(tokenizer))
    stream = tokenizer.detokenizer(skip)
    parts: list[list[int]] = []
    while ids[sum(map(len, parts)) :]:
        done = sum(map(len, parts))
        parts.append(ids[done : done + data.draw(st.integers(1, 5))])
    text = ""
    for part in parts:
        text += stream.push(part)
        assert stream.text == text
    text += stream.flush()
    assert text == stream.text == tokenizer.decode(ids, skip)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), prompt=st.text(max_size=20), text=st.text(max_size=30))
def test_output_continues_its_prompt(tokenizer, data, prompt, text):
    """Cut a text's ids anywhere that is not inside a character: prompt's text + output's text = the whole."""
    ids = tokenizer.encode(prompt + " " + text)
    cut = data.draw(st.integers(0, len(ids)))
    before = tokenizer.decode(ids[:cut])
    stream = tokenizer.detokenizer(prompt_ids=ids[:cut])
    after = "".join(stream.push([i]) for i in ids[cut:]) + stream.flush()
    whole = tokenizer.decode(ids)
    if "\ufffd" not in before + after:
        assert before + after == whole
    else:
        assert whole.endswith(after)


def test_a_character_that_the_prompt_began_belongs_to_the_output(data_dir):
    tokenizer = Tokenizer.from_folder(data_dir / "tokenizers/ort_ext/phi-2")
    ids = tokenizer.encode("x😀y")
    assert len(ids) > 3
    stream = tokenizer.detokenizer(prompt_ids=ids[:2])
    assert stream.push(ids[2:]) + stream.flush() == "😀y"


def test_sentencepiece_drops_the_first_space_of_a_text_but_not_of_a_continuation(data_dir):
    tokenizer = Tokenizer.from_folder(data_dir / "checkpoints/stories260K")
    prompt, output = tokenizer.encode("Once"), tokenizer.encode("upon", add_special_tokens=False)
    assert tokenizer.detokenizer(prompt_ids=prompt).push(output) == " upon"
    assert tokenizer.detokenizer(prompt_ids=prompt[:1]).push(output) == "upon"
    assert tokenizer.detokenizer().push(output) == "upon"


def test_bytes_are_held_until_nothing_can_spoil_them(data_dir):
    tokenizer = Tokenizer.from_folder(data_dir / "checkpoints/stories260K")
    euro = [3 + byte for byte in "€".encode()]
    stream = tokenizer.detokenizer()
    assert stream.push(euro) == ""
    assert stream.push([3 + 0xFF]) == ""
    assert stream.flush() == "\ufffd" * 4 == tokenizer.decode([*euro, 3 + 0xFF])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_restored_stream_goes_on_as_if_never_stopped(tokenizer, data):
    ids = data.draw(token_ids(tokenizer))
    cut = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.lists(st.text("the a", min_size=1, max_size=3), max_size=2))

    def fresh():
        return TextStream(tokenizer.detokenizer(), stop)

    whole, first = fresh(), fresh()
    expected = whole.push(ids) + whole.finish()
    shown = first.push(ids[:cut])
    if first.stop is None:
        second = fresh().restore(json.loads(json.dumps(first.state())))
        shown += second.push(ids[cut:]) + second.finish()
        assert (second.stop, second.num_tokens, second.text) == (whole.stop, whole.num_tokens, shown)
    assert shown == expected


def naive_stop(text: str, stops: list[str], include: bool) -> str:
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[:end] if include else text[: end - max(map(len, hits))]
    return text


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    include=st.booleans(),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_are_found_wherever_the_pieces_are_cut(pieces, include, stops):
    checker = StopChecker(stops, include)
    shown = ""
    for piece in pieces:
        shown += checker.push(piece)
        whole = naive_stop("".join(pieces), stops, include)
        assert whole.startswith(shown), "text was shown that a stop string took back"
    shown += checker.flush()
    assert shown == whole if pieces else shown == ""
    match = checker.match
    if match is not None:
        assert "".join(pieces)[match.start : match.end] == match.stop in stops


def test_only_what_may_begin_a_stop_string_is_held_back():
    checker = StopChecker(["<end>"])
    assert checker.push("abc<e") == "abc"
    assert checker.push("x") == "<ex"
    assert checker.push("<end") == ""
    assert checker.push(">tail") == ""
    assert checker.match is not None
    assert (checker.match.start, checker.match.end) == (6, 11)


def letters() -> Detokenizer:
    table = PieceTable("bytes", lambda i: chr(i), lambda ids: "".join(map(chr, ids)), frozenset())
    return Detokenizer(table)


def test_tokens_after_the_stop_string_are_not_kept():
    ids = [ord(c) for c in "abSTOPcd"]
    for include, text in ((False, "ab"), (True, "abSTOP")):
        stream = TextStream(letters(), ["STOP"], include)
        assert stream.push(ids) + stream.finish() == text
        assert (stream.stop, stream.num_tokens) == ("STOP", 6)


def test_the_first_min_tokens_cannot_begin_a_stop_string():
    stream = TextStream(letters(), ["aa"], min_tokens=3)
    assert stream.push([ord("a")] * 4) + stream.push([ord("a")] * 4) == "aaa"
    assert stream.num_tokens == 5
