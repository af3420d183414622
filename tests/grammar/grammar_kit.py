"""Compiled constraints over a vocabulary of single bytes, texts that they accept and texts that they make."""

import json
import random
import tarfile

from llguidance import LLMatcher, LLTokenizer

from headrace.engine.schedule.constraint import Constraint
from headrace.grammar.text import compile_error, grammar_text, refuse_empty

BYTES = LLTokenizer("byte")
"""A token for each byte, then some special ones."""
CLOSING, LIKELY = b'"]}', b'abcx1"0.5-[{,:tfn\\ '


def matcher_of(text: str) -> LLMatcher:
    """A grammar's matcher. Raises `RequestError` where it does not compile, or nothing fits it."""
    matcher = LLMatcher(BYTES, text, log_level=0)
    if matcher.is_error():
        raise compile_error(matcher.get_error())
    refuse_empty(matcher)
    return matcher


def compiled(constraint: Constraint) -> LLMatcher:
    return matcher_of(grammar_text(constraint))


def compiled_schema(schema, **options) -> LLMatcher:
    return compiled(Constraint.json_schema(schema, **options))


def accepts(matcher: LLMatcher, text: str | bytes) -> bool:
    """Whether a text fits, whole."""
    data = text.encode() if isinstance(text, str) else text
    trial = matcher.deep_copy()
    return trial.try_consume_tokens(list(data)) == len(data) and trial.is_accepting()


def accepts_json(matcher: LLMatcher, value) -> bool:
    return accepts(matcher, json.dumps(value, ensure_ascii=False))


def made(matcher: LLMatcher, draw: random.Random, steps: int = 60) -> bytes | None:
    """A text that random tokens of the masks make; None: none that ends soon."""
    trial, out = matcher.deep_copy(), bytearray()
    for step in range(2 * steps):
        if trial.is_accepting() and (step > steps or draw.random() < 0.3):
            return bytes(out)
        mask = int.from_bytes(trial.compute_bitmask(), "little")
        allowed = [token for token in range(256) if mask >> token & 1]
        assert allowed or trial.is_accepting(), f"nothing can follow {bytes(out)!r}"
        if not allowed:
            return bytes(out)
        closing = [token for token in allowed if token in CLOSING]
        likely = [token for token in allowed if token in LIKELY]
        if closing and draw.random() < (0.3 if step < steps else 0.95):
            allowed = closing
        elif likely and draw.random() < 0.85:
            allowed = likely
        token = draw.choice(allowed)
        assert trial.consume_token(token)
        out.append(token)
    return None


def schema_groups(data_dir, folder: str):
    """(name, schema, [(JSON, valid, what it shows)]) of each schema in a folder of the archive of real schemas."""
    with tarfile.open(data_dir / "schema" / "schema_cases.tar.gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            name = member.name.partition(folder)[2]
            if folder in member.name and name.endswith(".json") and "/" not in name:
                content = archive.extractfile(member)
                assert content is not None
                read = json.load(content)
                for group in read if isinstance(read, list) else [read]:
                    tests = [(test["data"], test["valid"], test["description"]) for test in group["tests"]]
                    yield f"{name}: {group['description']}", group["schema"], tests
