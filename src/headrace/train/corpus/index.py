"""index.json: the contents of a built folder. It is written last, so a folder with one is complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.config import require
from headrace.errors import ConfigError
from headrace.typed import read_fields

__all__ = ["INDEX", "OFFSETS", "VALIDATION", "VERSION", "Index", "Shard", "read_index", "sha256", "write_index"]

FORMAT = "headrace-data"
VERSION = 1
INDEX = "index.json"
OFFSETS = "offsets.npy"
"""int64 [documents + 1]: the offset of each document, in tokens over all shards in order, and the end."""
VALIDATION = "validation.npy"
"""int64: numbers of the held-out documents, ascending."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of tokens. Its loss-mask bits, where the data is masked, are in the `.mask` file beside it."""

    file: str
    tokens: int
    sha256: str
    mask_sha256: str = ""

    def __post_init__(self) -> None:
        require(Path(self.file).name == self.file and self.tokens >= 0, f"shard {self.file!r} is damaged")

    @property
    def mask(self) -> str:
        """The file of loss-mask bits, one per token, lowest bit first."""
        return str(Path(self.file).with_suffix(".mask"))


@dataclass(frozen=True, slots=True)
class Index:
    """Counts, hashes and sizes. Documents lie one after another and never cross shards; each ends with `eos`."""

    token_dtype: str
    vocab_size: int
    eos: int
    masked: bool
    documents: int
    validation: int
    tokens: int
    counted: int
    """Tokens that count in the loss."""
    shards: tuple[Shard, ...]
    files: dict[str, str]
    """sha256 of every other file."""
    made_from: tuple[str, ...] = ()
    identity: str = dataclasses.field(default="", compare=False)
    """sha256 of index.json itself: equal for equal data."""

    def __post_init__(self) -> None:
        require(self.token_dtype in ("uint16", "uint32"), f"token_dtype={self.token_dtype!r} is unknown")
        require(sum(shard.tokens for shard in self.shards) == self.tokens, "its shards do not add up to its tokens")
        require(0 <= self.validation < self.documents, "it has no document to train on")


def read_index(folder: str | Path) -> Index:
    """The index of a built folder. Raises `ConfigError` that names the file and what is wrong in it."""
    file = Path(folder) / INDEX
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{folder} is not a folder that `headrace data build` wrote: {INDEX}: {error.strerror}"
        ) from None
    try:
        fields: dict[str, Any] = json.loads(raw)
        made_by = fields.pop("format"), fields.pop("version")
        require(
            made_by == (FORMAT, VERSION),
            f"its format is {made_by[0]} version {made_by[1]}, not {FORMAT} version {VERSION}: build it again",
        )
        return read_fields(Index, {**fields, "identity": hashlib.sha256(raw).hexdigest()})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file} is damaged: {type(error).__name__}: {error}; build it again") from None


def write_index(folder: Path, index: Index) -> None:
    """Write index.json."""
    fields = dataclasses.asdict(index)
    del fields["identity"]
    text = json.dumps({"format": FORMAT, "version": VERSION, **fields}, indent=1, sort_keys=False)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
