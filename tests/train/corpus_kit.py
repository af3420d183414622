"""Folders built from little files, for the tests of data."""

import json

from headrace.train.corpus.build import BuildConfig, build
from headrace.train.corpus.folder import Corpus

WORDS = (
    "the",
    "river",
    "went",
    "to",
    "a",
    "mill,",
    "where",
    "Ada",
    "had",
    "12",
    "bells.",
    '"so',
    'blue!"',
    "über",
    "漢字",
    "😀",
)


def some_text(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def write_jsonl(file, values):
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return file


def built(tmp_path, *inputs, **options):
    """(the result, the folder opened) of a build."""
    settings = {"vocab_size": 300, **options}
    out = tmp_path / settings.pop("name", "data")
    result = build(BuildConfig(tuple(map(str, inputs)), out, **settings))
    return result, Corpus(out)


def whole_document(corpus, number):
    """(ids, counts) of a document as lists."""
    piece = corpus.piece(number, 0, int(corpus.lengths[number]))
    return piece.ids.tolist(), piece.counts.tolist()
