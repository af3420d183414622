"""Ids and text equal transformers' on real tokenizers; broken folders are named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from headrace.errors import CheckpointError, RequestError
from headrace.text.tokenizer import Tokenizer

FOLDERS = ("checkpoints/stories260K", "tokenizers/ort_ext/phi-2", "tokenizers/ort_ext/phi-3-mini")
TEXTS = (
    "Hello world",
    " lead",
    "",
    "  two   spaces ",
    "a<|end|>b<|user|> x",
    "é漢字😀👩‍👩‍👧\n\n",
    "<s>hi</s> there",
    "tabs\t\tx",
    " <|assistant|>\n hi",
    "12345 + 678 = 13023",
    "naïve façade",
    "\u200bzero\u0000width",
    "e\u0301",
)


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, data_dir) -> Path:
    return data_dir / request.param


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def test_ids_and_special_tokens_equal_transformers(ours, theirs):
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id) == (
        len(theirs),
        theirs.bos_token_id,
        theirs.eos_token_id,
    )
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_ids_equal_transformers_on_any_text(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_add_bos_and_eos_in_the_configuration_do_what_transformers_does(data_dir, tmp_path, bos, eos):
    transformers = pytest.importorskip("transformers")
    shutil.copy(data_dir / "checkpoints/stories260K/tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "add_bos_token": bos,
                "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
                "add_eos_token": eos,
            }
        )
    )
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("Once upon") == theirs.encode("Once upon")


def test_tokens_named_only_in_the_configuration_are_appended(data_dir, tmp_path):
    transformers = pytest.importorskip("transformers")
    shutil.copy(data_dir / "checkpoints/stories260K/tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "added_tokens_decoder": {"512": {"content": "<|call|>", "special": True, "normalized": False}},
                "eos_token": "<|stop|>",
            }
        )
    )
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a<|call|>b", "a<|stop|>", "plain"):
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.vocab_size, ours.eos_token_id) == (514, 513) == (len(theirs), theirs.eos_token_id)


def test_token_text_shows_a_token_inside_a_text(data_dir):
    ours = Tokenizer.from_folder(data_dir / "checkpoints/stories260K")
    assert ours.token_text(ours.encode("a the", add_special_tokens=False)[-1]) == " the"
    assert ours.token_text(3 + 0xC3) == "\ufffd"
    assert ours.token_text(10**6) == ""


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "not json"),
        ("tokenizer_config.json", '{"chat_template": 7}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
    ],
)
def test_a_broken_file_is_named(data_dir, tmp_path, file, text):
    shutil.copy(data_dir / "checkpoints/stories260K/tokenizer.json", tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=file):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused_with_the_numbers(data_dir):
    ours = Tokenizer.from_folder(data_dir / "checkpoints/stories260K")
    ours.check_vocabulary(512)
    with pytest.raises(CheckpointError, match="512 tokens but the model's vocabulary has 500"):
        ours.check_vocabulary(500)


@pytest.mark.parametrize("text", ["\ud800", 7, None])
def test_what_is_not_text_is_refused(data_dir, text):
    ours = Tokenizer.from_folder(data_dir / "checkpoints/stories260K")
    with pytest.raises(RequestError, match="prompt"):
        ours.encode(text)


@pytest.fixture
def small_tokenizer() -> Tokenizer:
    """Bytes, and an end token."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {"eos_token": "</s>"})


WRONG: dict[str, list[Any]] = {
    "eos_token": [5, True, ["</s>"], {"text": "x"}, {"content": 5}, "\ud800"],
    "added_tokens_decoder": [5, [1], "x", {"a": {"content": "x"}}, {"1": "x"}, {"1": {}}, {"1": {"content": 1}}],
    "add_prefix_space": ["yes", 1, []],
    "legacy": ["no", 0],
    "tokenizer_class": [5, ["LlamaTokenizer"]],
    "chat_template": [5, True, [5], [{"name": "default"}], {"default": 5}],
}


@pytest.mark.parametrize("key", WRONG)
def test_settings_of_the_wrong_type_are_named(tmp_path, small_tokenizer, key):
    small_tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    good = json.loads(file.read_text())
    for value in WRONG[key]:
        file.write_text(json.dumps(good | {key: value}))
        with pytest.raises(CheckpointError, match=key) as caught:
            Tokenizer.from_folder(tmp_path)
        assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    file.write_text(json.dumps(good | {key: None, "extra": 5}))
    Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"a": ', None], ids=str)
def test_broken_files_are_named(tmp_path, small_tokenizer, name, content):
    small_tokenizer.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_byte_order_marks_are_passed_over(tmp_path, small_tokenizer):
    small_tokenizer.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert Tokenizer.from_folder(tmp_path).encode("a cat") == small_tokenizer.encode("a cat")


def test_pieces_are_the_vocabularys_entries(data_dir):
    ours = Tokenizer.from_folder(data_dir / "checkpoints" / "stories260K")
    assert ours.pieces([*ours.encode("a the", add_special_tokens=False), 3 + 0xC3, 10**6])[-3:] == [
        "▁the",
        "<0xC3>",
        "",
    ]
