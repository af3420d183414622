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

__all__ = ["HUB", "Record", "TextPart", "kind_of", "read_parts", "read_records"]

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
    suffix = (path.with_suffix("") if path.suffix in PACKED else path).suffix
    require(
        suffix in KINDS and (path.suffix not in PACKED or suffix != ".parquet"),
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


def _opened(name: str) -> IO[bytes]:
    path = expanded(name)
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        if path.suffix == ".zst":
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
        self._line = 1
        self._searched = 0
        self._begun = False
        self._first = True

    def push(self, block: bytes) -> Iterator[TextPart]:
        self._decode(block, final=False)
        yield from self._split()
        if len(self._buffer) < BLOCK:
            return
        # Do not cut within a separator, and leave white space to the text after it.
        near = BEFORE_SPACE.finditer(self._buffer, max(0, self._limit() - NEAR), self._limit())
        cut = max((match.end() for match in near), default=0)
        if cut:
            yield from self._take(cut, last=False)
        elif self._limit() >= FORCED:
            yield from self._take(self._limit(), last=False)

    def end(self) -> Iterator[TextPart]:
        self._decode(b"", final=True)
        yield from self._split()
        yield from self._take(len(self._buffer), last=True)

    def _limit(self) -> int:
        return len(self._buffer) - max(0, len(self._split_on) - 1)

    def _split(self) -> Iterator[TextPart]:
        while self._split_on and (at := self._buffer.find(self._split_on, self._searched)) >= 0:
            yield from self._take(at, last=True)
            self._buffer = self._buffer[len(self._split_on) :]
            self._searched = 0
        self._searched = max(0, self._limit())

    def _take(self, end: int, last: bool) -> Iterator[TextPart]:
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        self._searched = 0
        line = self._line
        self._line += text.count("\n")
        if not self._begun:
            bare = text.lstrip("\r\n")
            line += text[: len(text) - len(bare)].count("\n")
            text = bare
        self._begun = (self._begun or bool(text)) and not last
        text = text.rstrip("\r\n") if last else text
        yield TextPart(f"{self._name}:{line}", text, last)

    def _decode(self, block: bytes, final: bool) -> None:
        try:
            text = self._decoder.decode(block, final)
        except UnicodeDecodeError as error:
            line = self._line + self._buffer.count("\n") + error.object[: error.start].count(b"\n")
            raise _not_utf8(f"{self._name}:{line}", error) from None
        self._buffer += text.removeprefix("\ufeff") if self._first else text
        self._first = self._first and not text


def _not_utf8(where: str, error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(f"{where}: not UTF-8: byte 0x{error.object[error.start]:02x}: {error.reason}; convert the file")


def _lines(name: str) -> Iterator[bytes]:
    rest = b""
    with _opened(name) as stream:
        for block in _blocks(stream, name):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
    if rest:
        yield rest


def _json_lines(name: str) -> Iterator[Record]:
    for number, line in enumerate(_lines(name), 1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
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
                    yield Record(f"{name}: row {number}", row)
    except ConfigError:
        raise
    except Exception as error:  # pyarrow raises many classes
        raise ConfigError(f"{name}: cannot be read after row {number}: {error}") from None


def _hub(name: str) -> Iterator[Record]:
    datasets = _library("datasets", name)
    dataset, _, split = name.removeprefix(HUB).partition("@")
    try:
        for number, row in enumerate(datasets.load_dataset(dataset, split=split or "train", streaming=True), 1):
            yield Record(f"{name}: row {number}", row)
    except ConfigError:
        raise
    except Exception as error:  # of the network, or of the dataset's files
        raise ConfigError(f"{name}: the dataset cannot be read: {type(error).__name__}: {error}") from None
