"""Read inputs as documents, for learning a tokenizer and for writing tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from headrace.config import require
from headrace.errors import ConfigError, RequestError
from headrace.text.template_process import TemplateProcess
from headrace.text.tokenizer import Tokenizer
from headrace.train import tinyworld
from headrace.train.corpus.chat import encode_chat, messages_of
from headrace.train.corpus.files import Record, TextPart, cut_text, kind_of, read_parts, read_records
from headrace.train.corpus.world import WHOLE_EXAM, encode_document

__all__ = ["CorpusInput", "Encoded", "cuts_cleanly"]

PROBES = (("One day", " she went"), ("one", "\ntwo"), ("the end.", "\n\n  x 12"), ("漢字", " 漢"), ("A-1", "\tb "))


@dataclass(frozen=True, slots=True)
class Encoded:
    """Consecutive tokens of a document, the `last` with the end token; or a skipped record."""

    ids: np.ndarray
    counts: np.ndarray | None = None
    """bool; None where all count."""
    last: bool = True
    skipped: bool = False


SKIPPED = Encoded(np.zeros(0, dtype=np.int64), skipped=True)


@dataclass(frozen=True, slots=True)
class CorpusInput:
    """The inputs; the fields are those of `BuildConfig`."""

    inputs: tuple[str, ...]
    chat: bool
    text_field: str
    messages_field: str
    split_on: str
    documents: int
    seed: int

    @property
    def generated(self) -> bool:
        """Whether the texts are tinyworld's."""
        return self.inputs == ("tinyworld",)

    @property
    def masked(self) -> bool:
        """Whether only some tokens count in the loss."""
        return self.chat or self.generated

    @property
    def eos(self) -> str:
        """The end token within the texts, or ""."""
        return tinyworld.END if self.generated else ""

    @property
    def exam(self) -> int:
        """The number of tinyworld's exam questions, which are the last documents."""
        return len(tinyworld.exam(self.seed, WHOLE_EXAM)) if self.generated else 0

    def texts(self, name: str) -> Iterator[str]:
        """One input's texts, to learn a tokenizer from."""
        if self.generated:
            for document in islice(tinyworld.documents(self.seed), self.documents):
                yield from (part for turn in document.turns for part in turn)
        elif self.chat:
            for record in self._records(name):
                for message in messages_of(record.where, record.value, self.messages_field):
                    yield _characters(message["content"], record.where)
        else:
            for part in self._parts(name):
                yield _characters(part.text, part.where)

    def encoded(self, tokenizer: Tokenizer, eos: int) -> Iterator[Encoded]:
        """All documents, in order."""
        if self.generated:
            yield from self._world(tokenizer)
            return
        if self.chat:
            yield from self._chats(tokenizer)
            return
        cut = cuts_cleanly(tokenizer)
        for name in self.inputs:
            parts = self._parts(name)
            yield from _encode_parts(parts if cut else _joined(parts), tokenizer, eos)

    def _chats(self, tokenizer: Tokenizer) -> Iterator[Encoded]:
        try:
            tokenizer.chat_template.uses("messages")
        except RequestError as error:
            raise ConfigError(f"--chat: {error}") from None
        with TemplateProcess() as templates:
            for name in self.inputs:
                for record in self._records(name):
                    messages = messages_of(record.where, record.value, self.messages_field)
                    found = encode_chat(tokenizer, messages, record.where, record.value.get("tools"), templates)
                    yield SKIPPED if found is None else Encoded(*found)

    def _world(self, tokenizer: Tokenizer) -> Iterator[Encoded]:
        for document in islice(tinyworld.documents(self.seed), self.documents):
            yield Encoded(*encode_document(document, tokenizer))
        for _, prompt, answer in tinyworld.exam(self.seed, WHOLE_EXAM):
            yield Encoded(*encode_document(tinyworld.Document(((prompt, answer),)), tokenizer))

    def _parts(self, name: str) -> Iterator[TextPart]:
        if kind_of(name) == "text":
            yield from read_parts(name, self.split_on)
            return
        for record in read_records(name, (self.text_field,)):
            require(
                self.text_field in record.value,
                f"{record.where}: has no field {self.text_field!r}; it has "
                f"{', '.join(map(str, record.value)) or 'none'}: name the right one with --text-field",
            )
            text = record.value[self.text_field]
            text = "" if text is None else text  # a row without text, as a table writes it
            require(
                isinstance(text, str), f"{record.where}: {self.text_field} must be a string, not {type(text).__name__}"
            )
            yield from cut_text(record.where, text)

    def _records(self, name: str) -> Iterator[Record]:
        require(kind_of(name) != "text", f"{name}: --chat needs records with messages: JSON lines, parquet or hub:…")
        return read_records(name, (self.messages_field, "tools"))


def cuts_cleanly(tokenizer: Tokenizer) -> bool:
    """Whether a text cut before white space keeps its tokens, so that long texts can be read in parts."""
    return all(
        tokenizer.encode(one + other) == tokenizer.encode(one) + tokenizer.encode(other, False) for one, other in PROBES
    )


def _joined(parts: Iterator[TextPart]) -> Iterator[TextPart]:
    """Join parts to whole documents."""
    texts: list[str] = []
    for part in parts:
        texts.append(part.text)
        if part.last:
            yield TextPart(part.where, "".join(texts))
            texts = []


def _encode_parts(parts: Iterator[TextPart], tokenizer: Tokenizer, eos: int) -> Iterator[Encoded]:
    """Tokenize parts; a document of white space or of an end token alone is skipped."""
    begun = False
    for part in parts:
        if not begun and not part.text.strip():
            if part.last:
                yield SKIPPED
            continue
        ids = tokenizer.encode(_characters(part.text, part.where), add_special_tokens=not begun)
        if part.last and ids[-1:] != [eos]:
            ids = [*ids, eos]
        if not begun and ids == [eos]:
            yield SKIPPED
            continue
        begun = not part.last
        yield Encoded(np.array(ids, dtype=np.int64), last=part.last)


def _characters(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: holds a lone surrogate, which is not a character: remove it") from None
    return text
