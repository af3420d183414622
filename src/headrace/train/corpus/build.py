"""Build a folder: learn or load a tokenizer, write every document's tokens, hold some documents out.

Everything is written into a hidden folder beside the target, index.json last; then the folder is renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.config import require
from headrace.errors import ConfigError
from headrace.text.tokenizer import Tokenizer
from headrace.train.corpus.bpe import learn_tokenizer
from headrace.train.corpus.documents import CorpusInput, Encoded
from headrace.train.corpus.files import HUB, kind_of
from headrace.train.corpus.index import INDEX, OFFSETS, VALIDATION, Index, sha256, write_index
from headrace.train.corpus.order import HOLD_OUT, permutation
from headrace.train.corpus.shards import SHARD_TOKENS, ShardWriter, flushed

__all__ = ["EOS", "BuildConfig", "Built", "build"]

EOS = "<|endoftext|>"
"""The end token of a tokenizer learnt here, and the default separator of a text file's documents."""
TINYWORLD = "tinyworld"
LEARN_FROM = 200_000_000
"""Characters from which a tokenizer is learnt, an equal share of each input."""

BuildProgress = Callable[[str, int, int], None]
"""Called with (name of the count, documents, tokens so far)."""


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """The arguments of `headrace data build`; errors name its flags.

    `inputs` are files, hub:owner/name[@split], or "tinyworld" alone. `validation`: the share of documents to hold out,
    at least one. `tokenizer`: a folder whose tokenizer is used, instead of learning one. `documents`: the number of
    tinyworld's texts.
    """

    inputs: tuple[str, ...]
    out: Path
    vocab_size: int = 8192
    tokenizer: Path | None = None
    text_field: str = "text"
    messages_field: str = "messages"
    chat: bool = False
    validation: float = 0.01
    split_on: str = EOS
    seed: int = 0
    documents: int = 20_000
    force: bool = False
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self) -> None:
        require(bool(self.inputs), "name the files to build from")
        require(0.0 <= self.validation < 1.0, f"--validation={self.validation} must be at least 0 and less than 1")
        require(self.vocab_size >= 1, f"--vocab-size={self.vocab_size} must be at least 1")
        require(self.seed >= 0, f"--seed={self.seed} must not be negative")
        require(self.documents >= 2, f"--documents={self.documents} must be at least 2")
        require(
            self.inputs == (TINYWORLD,) or TINYWORLD not in self.inputs,
            "tinyworld cannot be mixed with files: give one or the other",
        )
        require(not (self.chat and self.generated), "--chat is for files: tinyworld is written as chats anyway")

    @property
    def generated(self) -> bool:
        """Whether the texts are tinyworld's."""
        return self.inputs == (TINYWORLD,)


@dataclass(frozen=True, slots=True)
class Built:
    """The result of a build."""

    index: Index
    skipped: int
    """Records without text, or without a turn of the assistant."""
    ended_within: int
    """Documents with an end token before their end, which attention crosses."""


def build(config: BuildConfig, progress: BuildProgress | None = None) -> Built:
    """Build the folder `config.out`. Raises `ConfigError` that names the flag, or the file and line, at fault.

    The folder appears, or replaces an earlier one, only when it is complete.
    """
    for name in config.inputs if not config.generated else ():
        kind_of(name)
    _check_target(config)
    partial = config.out.parent / f".{config.out.name}.building-{os.getpid()}"
    try:
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            config.out.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            built = _write(config, partial, progress or (lambda *news: None))
            _put(partial, config.out)
    except OSError as error:
        raise ConfigError(f"{config.out}: cannot be written: {error.strerror or error}") from None
    return built


def _check_target(config: BuildConfig) -> None:
    out = config.out
    if not os.path.lexists(out):
        return
    require(config.force, f"{out} exists: name another folder, or replace it with --force")
    require(
        out.is_dir() and not out.is_symlink() and ((out / INDEX).is_file() or not any(out.iterdir())),
        f"{out} is not a folder that `headrace data build` wrote: --force does not replace it",
    )


def _write(config: BuildConfig, folder: Path, progress: BuildProgress) -> Built:
    source = CorpusInput(
        config.inputs,
        config.chat,
        config.text_field,
        config.messages_field,
        config.split_on,
        config.documents,
        config.seed,
    )
    tokenizer = _tokenizer(config, source, progress)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(
            f"--tokenizer={config.tokenizer}: the tokenizer has no end token: name an eos_token in its "
            "tokenizer_config.json"
        )
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writer = ShardWriter(folder, dtype, source.masked, config.shard_tokens)
    skipped = ended_within = 0
    try:
        for document in source.encoded(tokenizer, eos):
            ended_within += _append(writer, document, eos)
            skipped += document.skipped
            if not document.skipped and (writer.documents % 64 == 0):
                progress("tokens", writer.documents, writer.tokens)
        shards = writer.finish()
    finally:
        writer.abandon()
    require(
        writer.documents > 0,
        f"{', '.join(config.inputs)}: there is no text in it"
        if not config.chat
        else f"{', '.join(config.inputs)}: there is no conversation with a turn of the assistant in it",
    )
    held_out = _hold_out(config, writer.documents, source.exam)
    np.save(folder / VALIDATION, held_out, allow_pickle=False)
    _save(tokenizer, folder)
    names = (OFFSETS, VALIDATION, "tokenizer.json", "tokenizer_config.json")
    index = Index(
        dtype,
        tokenizer.vocab_size,
        eos,
        source.masked,
        writer.documents,
        len(held_out),
        writer.tokens,
        writer.counted,
        shards,
        {name: sha256(folder / name) for name in names},
        tuple(name if name.startswith(HUB) else Path(name).name for name in config.inputs),
    )
    write_index(folder, index)
    return Built(index, skipped, ended_within)


def _append(writer: ShardWriter, document: Encoded, eos: int) -> int:
    """Write one stretch of a document; 1 if it has an end token before its end."""
    if document.skipped:
        return 0
    writer.extend(document.ids, document.counts)
    if document.last:
        writer.end_document()
    inside = document.ids[1:-1] if document.last else document.ids[1:]
    return int(document.counts is None and bool((inside == eos).any()))


def _tokenizer(config: BuildConfig, source: CorpusInput, progress: BuildProgress) -> Tokenizer:
    if config.tokenizer is not None:
        require(config.tokenizer.is_dir(), f"--tokenizer={config.tokenizer} is not a folder")
        return Tokenizer.from_folder(config.tokenizer)

    def texts() -> Iterator[str]:
        share = LEARN_FROM // len(config.inputs)
        for name in config.inputs:
            left = share
            for text in source.texts(name):
                if left <= 0:
                    break
                yield text[:left]
                left -= len(text)
                progress("characters for the tokenizer", 0, share - left)

    eos = source.eos or EOS
    return learn_tokenizer(texts(), config.vocab_size, eos, "--vocab-size", str(config.out))


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    try:
        tokenizer.save(folder)
    except Exception as error:  # the library raises bare Exception where the disk is full
        raise OSError(str(error)) from None


def _hold_out(config: BuildConfig, documents: int, exam: int) -> np.ndarray:
    """Numbers of the held-out documents: tinyworld's exam, or a share drawn by the seed."""
    if exam:
        return np.arange(documents - exam, documents)
    share = max(1, round(config.validation * documents)) if config.validation and documents > 1 else 0
    return np.sort(permutation(documents, config.seed, HOLD_OUT)[: min(share, documents - 1)])


def _put(partial: Path, out: Path) -> None:
    """Rename the complete folder to `out`, and remove an earlier one."""
    for file in (*partial.iterdir(), partial):
        flushed(file)
    old = partial.with_name(f"{partial.name}.old")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    flushed(out.parent)
    shutil.rmtree(old, ignore_errors=True)
