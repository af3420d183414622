"""Reading files: documents whole and in parts, and every damage named by file and line."""

import gzip
import json
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.train import tinyworld
from headrace.train.corpus import files
from headrace.train.corpus.documents import cuts_cleanly
from headrace.train.corpus.files import read_parts, read_records
from train.corpus_kit import WORDS, built, whole_document, write_jsonl


def documents(parts):
    """Whole texts of parts."""
    texts, open_ = [], ""
    for part in parts:
        open_ += part.text
        if part.last:
            texts.append(open_)
            open_ = ""
    assert open_ == ""
    return texts


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["\n", " ", "ab", "é", "<|", "<|end|>", "漢", "\r\n", "x y", " \n "]), max_size=50),
    st.sampled_from(["<|end|>", "", "\n\n", "x y"]),
    st.integers(1, 40),
)
def test_any_block_size_reads_the_same_documents(tmp_path_factory, pieces, marker, block):
    text = "".join(pieces)
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(text.encode())
    expected = [one.strip("\r\n") for one in (text.split(marker) if marker else [text])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        patch.setattr(files, "FORCED", 4 * block)
        patch.setattr(files, "NEAR", block)
        parts = list(read_parts(str(file), marker))
    found = documents(parts)
    if block >= len(text.encode()):
        assert found == expected
    # Where a text without white space was cut by force, line breaks after that may already have been handed out.
    assert [one.rstrip("\r\n") for one in found] == [one.rstrip("\r\n") for one in expected]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS, " ", "\n", "\n\n", "  ", "\t", "12", "3.", "'s", " '", "a"]), max_size=80),
    st.integers(4, 60),
)
def test_parts_have_the_tokens_of_the_whole(tmp_path_factory, learnt, pieces, block):
    text = "x" + "".join(pieces) + "x"
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        patch.setattr(files, "NEAR", block)
        parts = list(read_parts(str(file), ""))
    assert [token for part in parts for token in learnt.encode(part.text)] == learnt.encode(text)


@pytest.fixture(scope="module")
def learnt():
    tokenizer = tinyworld.build_tokenizer(400, 0)
    assert cuts_cleanly(tokenizer)
    return tokenizer


def test_long_files_come_in_parts(tmp_path):
    (tmp_path / "a.txt").write_text("many words\n" * 300_000)
    parts = list(read_parts(str(tmp_path / "a.txt"), "<|endoftext|>"))
    assert len(parts) > 2 and max(len(part.text) for part in parts) < 3 * files.BLOCK
    assert documents(parts) == [("many words\n" * 300_000).rstrip("\n")]
    assert parts[0].where == f"{tmp_path / 'a.txt'}:1" and int(parts[-1].where.rpartition(":")[2]) > 100_000


@pytest.mark.parametrize("lines", [0, 1, 70_000])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path, lines, suffix):
    file = tmp_path / f"bad.{suffix}"
    good = b'{"text": "so it goes, on and on"}\n'
    file.write_bytes(good * lines + b'{"text": "a\xff"}\n' + good)
    with pytest.raises(ConfigError, match=rf"bad\.{suffix}:{lines + 1}: not UTF-8: byte 0xff"):
        built(tmp_path, file)


def test_a_cut_off_character_is_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine\nbut \xe6\xbc")
    with pytest.raises(ConfigError, match=r"bad\.txt:2: not UTF-8: byte 0xe6: unexpected end of data"):
        built(tmp_path, tmp_path / "bad.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"x\.jsonl:3: not JSON: .*; each line must be one JSON object"),
        ("[1]", r"x\.jsonl:3: each line must be a JSON object, not list"),
        ("null", r"x\.jsonl:3: .*NoneType"),
        ("[" * 100_000, r"x\.jsonl:3: not JSON"),
        ('{"text": 5}', r"x\.jsonl:3: text must be a string, not int"),
        ('{"text": "\\ud800"}', r"x\.jsonl:3: holds a lone surrogate"),
        ("{}", r"x\.jsonl:3: has no field 'text'"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine"}}\n')
    with pytest.raises(ConfigError, match=message):
        built(tmp_path, tmp_path / "x.jsonl")
    assert not (tmp_path / "data").exists()


def test_another_field_a_mark_at_the_start_and_windows_lines(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"body": "one"}\r\n{"body": "two"}')
    _, corpus = built(tmp_path, tmp_path / "x.jsonl", text_field="body")
    assert [corpus.tokenizer.decode(whole_document(corpus, i)[0]) for i in (0, 1)] == ["one", "two"]
    (tmp_path / "y.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"text": "one"}\r\n')
    assert [record.value for record in read_records(str(tmp_path / "y.jsonl"), ("text",))] == [{"text": "one"}]
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert documents(read_parts(str(tmp_path / "x.txt"), "")) == ["one\r\ntwo"]


def test_packed_files_read_like_others(tmp_path):
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"text": "packed"}))
    assert [record.value for record in read_records(str(tmp_path / "x.jsonl.gz"), ("text",))] == [{"text": "packed"}]
    whole = (tmp_path / "x.jsonl.gz").read_bytes()
    (tmp_path / "y.jsonl.gz").write_bytes(whole[:-9])
    (tmp_path / "z.txt.gz").write_bytes(b"not gzip at all")
    for name in ("y.jsonl.gz", "z.txt.gz"):
        with pytest.raises(ConfigError, match=f"{name} is damaged"):
            built(tmp_path, tmp_path / name)


@pytest.mark.parametrize("name", ["x.TXT", "x.Txt.GZ", "x.JSONL", "x.NdJson.Gz", "x.MD"])
def test_the_case_of_a_name_does_not_matter(tmp_path, name):
    text = json.dumps({"text": "so it goes"}) if "J" in name else "so it goes"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.lower().endswith(".gz") else text.encode())
    _, corpus = built(tmp_path, tmp_path / name)
    assert corpus.tokenizer.decode(whole_document(corpus, 0)[0]) == "so it goes"


def test_rows_without_text_are_skipped_and_counted(tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "abc"}, {"text": None}, {"text": ""}, {"text": "abc def"}])
    result, corpus = built(tmp_path, file)
    assert (result.skipped, corpus.index.documents) == (2, 2)
    with pytest.raises(ConfigError, match="there is no text in it"):
        built(tmp_path, write_jsonl(tmp_path / "y.jsonl", [{"text": None}] * 3), name="other")


@pytest.mark.parametrize("name", ["x.csv", "x", "x.json", "x.gz", "x.parquet.gz"])
def test_unknown_kinds_are_refused(tmp_path, name):
    (tmp_path / name).write_text("a")
    with pytest.raises(ConfigError, match=rf"{name}: the name of a file must end with one of \.txt"):
        built(tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "package"), [("x.parquet", "pyarrow"), ("x.txt.zst", "zstandard"), ("hub:owner/name", "datasets")]
)
def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name.replace("/", "-")).write_text("a")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    source = name if name.startswith("hub:") else tmp_path / name
    with pytest.raises(ConfigError, match=f"{name}: reading it needs {package}: pip install {package}"):
        built(tmp_path, source)


def test_lines_do_not_depend_on_blocks(tmp_path, monkeypatch):
    rows = [{"text": "ab" * length} for length in (0, 1, 30, 200, 3)]
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    for block in (1, 2, 7, 64, 1000):
        monkeypatch.setattr(files, "BLOCK", block)
        assert [record.value for record in read_records(str(file), ("text",))] == rows


def test_a_long_line_is_copied_once(tmp_path, monkeypatch):
    class Counted(bytes):
        def __radd__(self, before):
            copied.append(len(before))
            return before + bytes(self)

    copied: list[int] = []
    blocks = files._blocks
    monkeypatch.setattr(files, "BLOCK", 100)
    monkeypatch.setattr(files, "_blocks", lambda *arguments: map(Counted, blocks(*arguments)))
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "so it goes " * 1000}])
    assert len(list(read_records(str(file), ("text",)))) == 1
    assert sum(copied) <= len(file.read_bytes()), "each block is put behind all that came before it"


def test_short_documents_are_copied_once():
    class Counted(str):
        def __getitem__(self, where):
            found = super().__getitem__(where)
            copied.append(len(found))
            return Counted(found)

        def __add__(self, after):
            return Counted(str(self) + after)

    copied: list[int] = []
    block = b"ab\n" * 1000
    reader = files._TextReader("x", "\n")
    reader._buffer = Counted("")
    assert len([part for _ in range(3) for part in reader.push(block)]) == 3000
    assert sum(copied) <= 2 * 3 * len(block), "all that follows is copied for each document"


def test_a_long_text_of_a_record_comes_in_parts(tmp_path, monkeypatch, learnt):
    text = "so it goes, on and on " * 400 + "x" * 5000 + " end"
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": text}, {"text": "short"}])
    learnt.save(tmp_path)
    _, whole = built(tmp_path, file, tokenizer=tmp_path, name="whole")
    monkeypatch.setattr(files, "BLOCK", 1000)
    monkeypatch.setattr(files, "FORCED", 8000)
    parts = list(files.cut_text("x:1", text))
    assert len(parts) > 8 and "".join(part.text for part in parts) == text
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    _, cut = built(tmp_path, file, tokenizer=tmp_path, name="cut")
    assert [whole_document(cut, i) for i in (0, 1)] == [whole_document(whole, i) for i in (0, 1)]
    monkeypatch.setattr(files, "FORCED", 2000)
    assert "".join(part.text for part in files.cut_text("x:1", "y" * 9000)) == "y" * 9000
    assert max(len(part.text) for part in files.cut_text("x:1", "y" * 9000)) == 2000


def test_a_hub_dataset_is_streamed(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        if name == "owner/broken":
            raise ConnectionError("no network")
        return iter([{"text": "one"}, {"text": "two"}])

    fake = types.ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    _, corpus = built(tmp_path, "hub:owner/name@test")
    assert corpus.index.documents == 2 and corpus.index.made_from == ("hub:owner/name@test",)
    assert set(asked) == {("owner/name", "test", True)}
    with pytest.raises(ConfigError, match="hub:owner/broken: the dataset cannot be read: ConnectionError: no network"):
        built(tmp_path, "hub:owner/broken", name="other")


def test_parquet_is_read_by_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(3000)], "n": list(range(3000))}), file)
    _, corpus = built(tmp_path, file)
    assert corpus.index.documents == 3000
    assert corpus.tokenizer.decode(whole_document(corpus, 2999)[0]) == "text 2999"
    with pytest.raises(ConfigError, match=r"x\.parquet: has no column 'body'; it has text, n"):
        built(tmp_path, file, text_field="body", name="other")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "y.parquet")
    result, corpus = built(tmp_path, tmp_path / "y.parquet", name="with a null")
    assert (result.skipped, corpus.index.documents) == (1, 1)
    parquet.write_table(pyarrow.table({"text": [b"a"]}), tmp_path / "z.PARQUET")
    with pytest.raises(ConfigError, match=r"z\.PARQUET: row 1: text must be a string, not bytes"):
        built(tmp_path, tmp_path / "z.PARQUET", name="other")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"x\.parquet: cannot be read after row 0"):
        built(tmp_path, file, name="other")
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]] * 4
    parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "chats.parquet")
    _, corpus = built(tmp_path, tmp_path / "chats.parquet", chat=True, name="chats")
    assert corpus.index.masked and corpus.index.counted == 4 * corpus.tokenizer.encode("yes<|endoftext|>").__len__()


def test_inputs_are_read_in_order(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "first"}])
    (tmp_path / "two.txt").write_text("second")
    _, corpus = built(tmp_path, tmp_path / "two.txt", one)
    assert [corpus.tokenizer.decode(whole_document(corpus, i)[0]) for i in (0, 1)] == ["second", "first"]
