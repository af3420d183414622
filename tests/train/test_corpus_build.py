"""Building a folder: what is in it, how it gets its name, and what is refused."""

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from headrace.errors import ConfigError
from headrace.train import tinyworld
from headrace.train.config import DataConfig
from headrace.train.corpus.build import BuildConfig, build
from headrace.train.corpus.folder import Corpus, check_folder
from headrace.train.corpus.index import read_index
from headrace.train.data import open_source
from train.corpus_kit import built, some_text, whole_document, write_jsonl


@pytest.fixture
def texts(tmp_path):
    """20 texts as a file of JSON lines, and the texts."""
    rng = random.Random(3)
    values = [some_text(rng, rng.randint(1, 40)) for _ in range(20)]
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": value} for value in values]), values


def decoded(corpus):
    """Every document's text; each ends with the end token."""
    found = []
    for number in range(corpus.index.documents):
        ids, counts = whole_document(corpus, number)
        assert ids[-1] == corpus.index.eos == corpus.tokenizer.eos_token_id and counts[-1]
        found.append(corpus.tokenizer.decode(ids[:-1], skip_special_tokens=False))
    return found


def test_a_folder_holds_the_texts(tmp_path, texts):
    file, values = texts
    result, corpus = built(tmp_path, file, validation=0.2)
    assert decoded(corpus) == values
    assert result.index == corpus.index and result.index.validation == 4
    assert corpus.index.tokens == sum(corpus.lengths) == corpus.index.counted
    assert (corpus.index.token_dtype, corpus.index.made_from) == ("uint16", ("texts.jsonl",))
    assert check_folder(tmp_path / "data") == corpus.index
    assert {entry.name for entry in (tmp_path / "data").iterdir()} == {
        "index.json",
        "offsets.npy",
        "validation.npy",
        "shard-00000.bin",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_text_files_are_split_where_the_marker_is(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\n<|endoftext|>\n\nTwo\nlines.\n<|endoftext|>\n \n<|endoftext|>Three")
    (tmp_path / "b.md").write_text("\n# Four\n")
    result, corpus = built(tmp_path, tmp_path / "a.txt", tmp_path / "b.md")
    assert decoded(corpus) == ["One.", "Two\nlines.", "Three", "# Four"] and result.skipped == 1
    _, other = built(tmp_path, tmp_path / "a.txt", split_on="Two", name="other")
    # An end token that a text itself ends with is its end.
    assert decoded(other) == ["One.\n\n", "lines.\n<|endoftext|>\n \n<|endoftext|>Three"]
    result, whole = built(tmp_path, tmp_path / "a.txt", split_on="", name="whole")
    assert len(decoded(whole)) == 1 and result.ended_within == 1


def test_shards_are_many_and_read_as_one(tmp_path, texts):
    file, values = texts
    _, one = built(tmp_path, file, name="one")
    _, many = built(tmp_path, file, name="many", shard_tokens=100)
    assert len(one.index.shards) == 1 < len(many.index.shards)
    assert decoded(many) == values
    assert check_folder(tmp_path / "many").tokens == one.index.tokens


def test_the_same_input_builds_the_same_folder(tmp_path, texts):
    file, _ = texts
    one, two = (built(tmp_path, file, name=name)[1].index for name in ("one", "two"))
    assert one.identity == two.identity
    other = built(tmp_path, file, name="other", seed=1, validation=0.5)[1]
    assert other.index.identity != one.identity
    assert sorted([*other.validation, *other.training]) == list(range(20)) and len(other.validation) == 10


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path, texts):
    file, values = texts
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    built(tmp_path, file, name="small")[1].tokenizer.save(folder)
    learnt = json.loads((folder / "tokenizer.json").read_text())
    learnt["model"]["vocab"] |= {f"word{i}": 300 + i for i in range(1 << 16)}
    (folder / "tokenizer.json").write_text(json.dumps(learnt))
    _, large = built(tmp_path, file, name="large", tokenizer=folder)
    assert (large.index.vocab_size, large.index.token_dtype) == (300 + (1 << 16), "uint32")
    assert decoded(large) == values


def test_a_tokenizer_is_taken_over(tmp_path, texts):
    file, values = texts
    built(tmp_path, file, name="first")
    _, second = built(tmp_path, file, name="second", tokenizer=tmp_path / "first", vocab_size=1)
    assert decoded(second) == values
    assert (tmp_path / "first" / "tokenizer.json").read_bytes() == (tmp_path / "second" / "tokenizer.json").read_bytes()


def test_tinyworld_can_be_built(tmp_path):
    _, corpus = built(tmp_path, "tinyworld", documents=50, vocab_size=320)
    exam = tinyworld.exam(0, 10**6)
    assert corpus.index.documents == 50 + len(exam) and corpus.index.validation == len(exam)
    assert decoded(corpus)[50:53] == [prompt + answer for _, prompt, answer in exam[:3]]
    ids, counts = whole_document(corpus, 50)
    asked = corpus.tokenizer.encode(exam[0][1])
    assert counts == [False] * len(asked) + [True] * (len(ids) - len(asked))
    batch = open_source(DataConfig(str(tmp_path / "data"), 0)).stream(2, 64).next()
    assert 0 < len(batch.rows_R) < batch.num_tokens


def test_an_existing_folder_stays_unless_force_says_so(tmp_path, texts):
    file, values = texts
    built(tmp_path, file)
    before = read_index(tmp_path / "data").identity
    with pytest.raises(ConfigError, match=r"data exists: name another folder, or replace it with --force"):
        built(tmp_path, file)
    with pytest.raises(ConfigError, match=r"--vocab-size=5 must be at least 260"):
        built(tmp_path, file, vocab_size=5, force=True)
    assert read_index(tmp_path / "data").identity == before
    _, corpus = built(tmp_path, file, vocab_size=280, force=True)
    assert corpus.index.vocab_size == 280 and decoded(corpus) == values
    assert {entry.name for entry in tmp_path.iterdir()} == {"data", "texts.jsonl"}


def test_force_replaces_no_folder_of_another_kind(tmp_path, texts):
    file, _ = texts
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("keep me")
    with pytest.raises(ConfigError, match=r"is not a folder that `headrace data build` wrote"):
        built(tmp_path, file, force=True)
    assert (tmp_path / "data" / "precious").read_text() == "keep me"
    (tmp_path / "data" / "precious").unlink()
    assert built(tmp_path, file, force=True)[0].index.documents == 20


def test_a_failed_build_leaves_nothing(tmp_path, texts):
    file, _ = texts
    with file.open("a") as stream:
        stream.write('{"text": 3}\n')
    with pytest.raises(ConfigError, match=r"texts\.jsonl:21: text must be a string, not int"):
        built(tmp_path, file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["texts.jsonl"]


def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path, texts):
    file, _ = texts
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from headrace.train.corpus import build as room\n"
        "room.write_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"room.build(room.BuildConfig(({str(file)!r},), Path({str(tmp_path / 'data')!r}), 300))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    [left] = [entry for entry in tmp_path.iterdir() if entry.is_dir()]
    with pytest.raises(ConfigError, match="is not a folder that `headrace data build` wrote"):
        read_index(left)
    assert built(tmp_path, file)[0].index.documents == 20


def test_a_full_disk_is_told(tmp_path, texts):
    file, _ = texts
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from headrace.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        f"sys.exit(main(['data', 'build', {str(file)!r}, '--out', {str(tmp_path / 'data')!r},"
        " '--vocab-size', '300']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "data: cannot be written: File too large" in ended.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.mark.parametrize("name", ["shard-00000.bin", "offsets.npy", "validation.npy", "tokenizer.json", "index.json"])
def test_damage_is_named(tmp_path, texts, name):
    file, _ = texts
    built(tmp_path, file, validation=0.2)
    damaged = tmp_path / "data" / name
    raw = damaged.read_bytes()
    damaged.write_bytes(raw[:-4])
    with pytest.raises(ValueError, match=name):
        Corpus(tmp_path / "data")
    damaged.unlink()
    with pytest.raises(ValueError, match=name):
        Corpus(tmp_path / "data")
    damaged.write_bytes(raw)
    assert Corpus(tmp_path / "data").index.documents == 20


def test_bytes_that_changed_are_found_by_checking(tmp_path, texts):
    file, _ = texts
    built(tmp_path, file)
    shard = tmp_path / "data" / "shard-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[0:2] = np.array([0xFFFF], dtype="<u2").tobytes()
    shard.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"shard-00000\.bin is damaged: its hash is not that of the build"):
        check_folder(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"document 0 has ids outside of the vocabulary"):
        Corpus(tmp_path / "data").piece(0, 0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ()}, "name the files"),
        ({"validation": 1.0}, "--validation=1.0"),
        ({"validation": -0.1}, "--validation"),
        ({"vocab_size": 0}, "--vocab-size=0"),
        ({"seed": -1}, "--seed=-1"),
        ({"documents": 1}, "--documents=1"),
        ({"inputs": ("tinyworld", "a.txt")}, "tinyworld cannot be mixed"),
        ({"inputs": ("tinyworld",), "chat": True}, "--chat is for files"),
        ({"inputs": ("missing.txt",)}, r"missing\.txt: there is no such file"),
        ({"inputs": ("hub:",)}, "name a dataset"),
        ({"inputs": (os.sep,)}, "is a folder: name its files"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        build(BuildConfig(**{"inputs": ("x.txt",), "out": tmp_path / "data", **change}))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is no text in it"),
        ('{"text": "<|endoftext|>"}', "there is no text in it"),
        ('{"text": ""}\n{"text": " \\n"}\n', "there is no text in it"),
        ('{"text": "a"}\n{"body": "b"}\n', r"x\.jsonl:2: has no field 'text'; it has body: .*--text-field"),
    ],
)
def test_inputs_without_text_are_refused(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        built(tmp_path, tmp_path / "x.jsonl")


def test_a_tokenizer_without_an_end_is_refused(tmp_path, texts):
    file, _ = texts
    _, corpus = built(tmp_path, file)
    (tmp_path / "data" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"--tokenizer=.*data: the tokenizer has no end token"):
        built(tmp_path, file, name="other", tokenizer=tmp_path / "data")
    with pytest.raises(ConfigError, match=r"--tokenizer=.*nothing is not a folder"):
        built(tmp_path, file, name="other", tokenizer=tmp_path / "nothing")
    assert corpus.index.documents == 20


def test_one_document_is_trained_on(tmp_path):
    (tmp_path / "one.txt").write_text("one text alone")
    _, corpus = built(tmp_path, tmp_path / "one.txt")
    assert corpus.index.validation == 0 and corpus.training.tolist() == [0]
    source = open_source(DataConfig(str(tmp_path / "data"), 0))
    assert source.validation(8, 2) == [] and source.stream(1, 8).next().num_rows == 1


def test_a_real_corpus_reads_back(tmp_path, data_dir):
    text = data_dir / "text" / "quickstart_pd_1mb.txt"
    _, corpus = built(tmp_path, text, vocab_size=400)
    assert decoded(corpus) == [text.read_bytes().decode().strip("\r\n")]
    assert corpus.tokenizer.encode(decoded(corpus)[0]) == whole_document(corpus, 0)[0][:-1]
