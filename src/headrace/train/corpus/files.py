"""Read the inputs of a corpus: text, JSON lines, parquet and hub datasets, with the place of every text."""

from __future__ import annotations

import codecs
import gzip
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from headrace.config import require
from headrace.errors import ConfigError
from headrace.typed import expanded

__all__ = ["HUB", "Record", "TextPart", "cut_text", "kind_of", "read_parts", "read_records"]

KINDS = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
PACKED = (".gz", ".zst")
HUB = "hub:"
BLOCK = 1 << 20
"""Bytes read at once; a part has about as many characters at most."""
NEAR = 1 << 14
"""Characters at the end of a block that are searched for white space."""
FORCED = 4 * BLOCK
"""Characters without white space after which a text is cut anyway."""
ROWS = 1024
"""Rows of a parquet file in memory at once."""
BEFORE_SPACE = re.compile(r"\S(?=\s)")


@dataclass(frozen=True, slots=True)
class TextPart:
    """Consecutive text of a document, cut before white space; `last` ends the document."""

    where: str
    text: str
    last: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a file of records."""

    where: str
    value: Mapping[str, Any]


def kind_of(name: str) -> str:
    """One of text, jsonl, parquet, hub. Raises `ConfigError` for anything else and for a missing file."""
    if name.startswith(HUB):
        require(len(name) > len(HUB), f"{name}: name a dataset, as hub:owner/name or hub:owner/name@split")
        return "hub"
    path = expanded(name)
    require(not path.is_dir(), f"{name} is a folder: name its files")
    require(path.is_file(), f"{name}: there is no such file")
    packed = path.suffix.lower() in PACKED
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    require(
        suffix in KINDS and not (packed and suffix == ".parquet"),
        f"{name}: the name of a file must end with one of {', '.join(KINDS)}, text and JSON lines also with "
        f"{' or '.join(PACKED)} after that",
    )
    return KINDS[suffix]


def read_records(name: str, fields: tuple[str, ...]) -> Iterator[Record]:
    """The objects of a JSON-lines file, a parquet file or a hub dataset.

    Of a parquet file, those columns of `fields` that it has are read. Raises `ConfigError` that names the file and the
    line that cannot be read.
    """
    kind = kind_of(name)
    if kind == "jsonl":
        return _json_lines(name)
    return _parquet(name, fields) if kind == "parquet" else _hub(name)


def read_parts(name: str, split_on: str) -> Iterator[TextPart]:
    """The documents of a text file, in parts of about a million characters.

    A document ends at every `split_on` ("" for the whole file), and line breaks at its ends are not part of it.
    Raises `ConfigError` that names the file and the line of bytes that are not UTF-8.
    """
    reader = _TextReader(name, split_on)
    with _opened(name) as stream:
        for block in _blocks(stream, name):
            yield from reader.push(block)
        yield from reader.end()


def cut_text(where: str, text: str) -> Iterator[TextPart]:
    """A document in parts of about a million characters, as `read_parts` cuts those of text files."""
    begin = 0
    while len(text) - begin > BLOCK:
        ends = (_cut(text, begin, begin + size) for size in range(BLOCK, min(FORCED, len(text) - begin) + 1, BLOCK))
        end = next(filter(None, ends), min(begin + FORCED, len(text)))
        if end == len(text):
            break
        yield TextPart(where, text[begin:end], last=False)
        begin = end
    yield TextPart(where, text[begin:])


def _cut(text: str, begin: int, limit: int) -> int:
    """Where to cut between `begin` and `limit`: before white space, which the next part begins with; 0 if nowhere."""
    near = BEFORE_SPACE.finditer(text, max(begin, limit - NEAR), limit)
    return max((match.end() for match in near), default=0)


def _opened(name: str) -> IO[bytes]:
    path = expanded(name)
    try:
        if path.suffix.lower() == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        if path.suffix.lower() == ".zst":
            stream: IO[bytes] = _library("zstandard", name).open(path, "rb")
            return stream
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror or error}") from None


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise ConfigError(f"{name}: reading it needs {package}: pip install {package}") from None


def _blocks(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """Blocks of bytes. Raises `ConfigError` where the compression is damaged."""
    while True:
        try:
            block = stream.read(BLOCK)
        except Exception as error:  # gzip and zstandard each have their own
            raise ConfigError(f"{name} is damaged: {error}") from None
        if not block:
            return
        yield block


class _TextReader:
    """Bytes in, parts of documents out."""

    def __init__(self, name: str, split_on: str) -> None:
        self._name = name
        self._split_on = split_on
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._buffer = ""
        self._at = 0
        """Where the text in the buffer begins that has not been handed out."""
        self._searched = 0
        """Before this no separator begins."""
        self._line = 1
        self._begun = False
        self._first = True

    def push(self, block: bytes) -> Iterator[TextPart]:
        self._decode(block, final=False)
        yield from self._split()
        if len(self._buffer) - self._at < BLOCK:
            return
        limit = self._limit()  # before a separator that may go on in the next block
        if cut := _cut(self._buffer, self._at, limit):
            yield self._take(cut, last=False)
        elif limit - self._at >= FORCED:
            yield self._take(limit, last=False)

    def end(self) -> Iterator[TextPart]:
        self._decode(b"", final=True)
        yield from self._split()
        yield self._take(len(self._buffer), last=True)

    def _limit(self) -> int:
        return len(self._buffer) - max(0, len(self._split_on) - 1)

    def _split(self) -> Iterator[TextPart]:
        while self._split_on and (at := self._buffer.find(self._split_on, self._searched)) >= 0:
            yield self._take(at, last=True)
            self._at = self._searched = at + len(self._split_on)
        self._searched = max(self._at, self._limit())

    def _take(self, end: int, last: bool) -> TextPart:
        text = self._buffer[self._at : end]
        self._at = self._searched = end
        line = self._line
        self._line += text.count("\n")
        if not self._begun:
            bare = text.lstrip("\r\n")
            line += text[: len(text) - len(bare)].count("\n")
            text = bare
        self._begun = (self._begun or bool(text)) and not last
        text = text.rstrip("\r\n") if last else text
        return TextPart(f"{self._name}:{line}", text, last)

    def _decode(self, block: bytes, final: bool) -> None:
        try:
            text = self._decoder.decode(block, final)
        except UnicodeDecodeError as error:
            line = self._line + self._buffer.count("\n", self._at) + error.object[: error.start].count(b"\n")
            raise _not_utf8(f"{self._name}:{line}", error) from None
        self._buffer = self._buffer[self._at :] + (text.removeprefix("\ufeff") if self._first else text)
        self._searched -= self._at
        self._at = 0
        self._first = self._first and not text


def _not_utf8(where: str, error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(f"{where}: not UTF-8: byte 0x{error.object[error.start]:02x}: {error.reason}; convert the file")


def _lines(name: str) -> Iterator[bytes]:
    begun: list[bytes] = []
    """The blocks of a line that goes on; joined once, as a line may be as long as the file."""
    with _opened(name) as stream:
        for block in _blocks(stream, name):
            first, *others = block.split(b"\n")
            begun.append(first)
            if others:
                yield b"".join(begun)
                yield from others[:-1]
                begun = others[-1:]
    yield b"".join(begun)


def _json_lines(name: str) -> Iterator[Record]:
    for number, line in enumerate(_lines(name), 1):
        where = f"{name}:{number}"
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not JSON: {error}; each line must be one JSON object") from None
        require(isinstance(value, dict), f"{where}: each line must be a JSON object, not {type(value).__name__}")
        yield Record(where, value)


def _parquet(name: str, fields: tuple[str, ...]) -> Iterator[Record]:
    parquet = _library("pyarrow.parquet", name)
    number = 0
    try:
        with parquet.ParquetFile(name) as file:
            columns = [field for field in fields if field in file.schema_arrow.names]
            if not columns:
                raise ConfigError(f"{name}: has no column {fields[0]!r}; it has {', '.join(file.schema_arrow.names)}")
            for rows in file.iter_batches(batch_size=ROWS, columns=columns):
                for row in rows.to_pylist():
                    number += 1
                    found = {field: _as_written(row[field], rows.schema.field(field).type) for field in columns}
                    yield Record(f"{name}: row {number}", found)
    except ConfigError:
        raise
    except Exception as error:  # pyarrow raises many classes
        raise ConfigError(f"{name}: cannot be read after row {number}: {error}") from None


def _as_written(value: Any, kind: Any = None) -> Any:
    """A value of an Arrow column of type `kind` without the nulls that Arrow invents.

    Every record of a column has the same keys, so a key that a record was written without is null in it. Nulls in lists
    and in maps were written.
    """
    if isinstance(value, dict):
        return {
            key: _as_written(item, kind and kind.field(key).type) for key, item in value.items() if item is not None
        }
    if isinstance(value, list) and kind is not None and hasattr(kind, "item_type"):
        return {key: _as_written(item, kind.item_type) for key, item in value}
    if isinstance(value, list):
        return [_as_written(item, kind and kind.value_type) for item in value]
    return value


def _hub(name: str) -> Iterator[Record]:
    datasets = _library("datasets", name)
    dataset, _, split = name.removeprefix(HUB).partition("@")
    try:
        for number, row in enumerate(datasets.load_dataset(dataset, split=split or "train", streaming=True), 1):
            yield Record(f"{name}: row {number}", {field: _as_written(value) for field, value in row.items()})
    except ConfigError:
        raise
    except Exception as error:  # of the network, or of the dataset's files
        raise ConfigError(f"{name}: the dataset cannot be read: {type(error).__name__}: {error}") from None
