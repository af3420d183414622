"""Constraints on real schemas: which are served, what their grammars accept, and what a mask costs.

    python bench/grammar.py [--quick] [--data FOLDER]

For MaskBench and the JSON Schema Test Suite, drafts 7 and 2020-12: the schemas that are served, the valid instances
that are accepted, as they are written and with properties in the grammar's order, and every invalid instance that is;
beside it the same of llguidance alone. Instances are written with ", " and ": " and given to the matcher token by
token, with the vocabulary of phi-2 (50,000 tokens); every mask on the way is measured. FOLDER holds
schema/schema_cases.tar.gz and tokenizers/ort_ext/phi-2, and is $HEADRACE_DATA where it is not given. Writes
docs/results/grammar.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from headrace.bench.measure import write_results
from headrace.engine.schedule.constraint import Constraint
from headrace.errors import RequestError
from headrace.grammar.text import compile_error, grammar_text, refuse_empty
from headrace.grammar.vocabulary import grammar_tokenizer
from headrace.text.tokenizer import Tokenizer

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
SUITES = {"maskbench": "maskbench/", "draft7": "tests/draft7/", "draft2020-12": "tests/draft2020-12/"}
Compile = Callable[[Any], LLMatcher]
"""A schema's matcher. Raises `RequestError` where it is not served."""


@dataclass
class Case:
    """A schema, and instances that are valid under it or not: (JSON, valid, what it shows)."""

    name: str
    schema: Any
    tests: list[tuple[Any, bool, str]]


@dataclass
class Counts:
    """What one side makes of a suite."""

    schemas: int = 0
    served: int = 0
    valid: int = 0
    accepted: int = 0
    accepted_in_its_order: int = 0
    invalid: int = 0
    invalid_accepted: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """Reasons, and how many schemas each has."""
    served_names: list[str] = field(default_factory=list)


class Vocabulary:
    """phi-2's tokens, and a token for every byte."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        self.size = self.tokenizer.vocab_size
        self.matching: LLTokenizer = grammar_tokenizer(self.tokenizer, self.size)
        pieces = ((self.tokenizer.token_bytes(i), i) for i in reversed(range(self.size)))
        self._bytes = {piece[0]: i for piece, i in pieces if len(piece) == 1}

    def tokens(self, text: str) -> list[int]:
        """As the tokenizer writes a text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def byte_tokens(self, text: str) -> list[int]:
        """One for every byte."""
        return [self._bytes[byte] for byte in text.encode()]


def main() -> None:
    """Run all suites."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every twentieth schema, to try the script")
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADRACE_DATA"))
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data, or HEADRACE_DATA, must name the folder of real data")
    words = Vocabulary(arguments.data / "tokenizers" / "ort_ext" / "phi-2")
    results: dict[str, Any] = {"tokens": words.size}
    masks: list[float] = []
    compiles: list[float] = []
    for suite, prefix in SUITES.items():
        cases = list(read_cases(arguments.data / "schema" / "schema_cases.tar.gz", prefix))
        cases = cases[::20] if arguments.quick else cases
        ours = judged(cases, lambda schema: compiled(schema, words, compiles), words)
        alone = judged(cases, lambda schema: compiled_alone(schema, words), words)
        shared = set(alone.served_names) & set(ours.served_names)
        both = judged(
            [case for case in cases if case.name in shared], lambda schema: compiled(schema, words, []), words
        )
        results[suite] = {
            "headrace": told(ours),
            "llguidance alone": told(alone),
            "headrace, where both serve": told(both),
        }
        for side, counts in (("headrace", ours), ("llguidance alone", alone), ("headrace, where both serve", both)):
            print(line(f"{suite}, {side}", counts), flush=True)
        for example in ours.invalid_accepted:
            print(f"  accepted although invalid: {example}")
        measure_masks(cases, words, masks)
    results["mask_us"] = figures(masks)
    results["compile_ms"] = figures(compiles)
    print("mask, µs:   ", results["mask_us"])
    print("compile, ms:", results["compile_ms"])
    if not arguments.quick:
        print(write_results("grammar", results))


def read_cases(archive: Path, prefix: str) -> Iterator[Case]:
    """The cases of one suite; schemas of draft 7 name it, as the suite means them."""
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            name = member.name.partition(prefix)[2]
            if prefix not in member.name or not name.endswith(".json") or "/" in name:
                continue
            content = files.extractfile(member)
            assert content is not None
            read = json.load(content)
            for group in read if isinstance(read, list) else [read]:
                schema = group["schema"]
                if "draft7" in prefix and isinstance(schema, dict):
                    schema = {"$schema": DRAFT_7, **schema}
                tests = [(test["data"], test["valid"], test["description"]) for test in group["tests"]]
                title = name.removesuffix(".json")
                yield Case(f"{title}: {group['description']}" if isinstance(read, list) else title, schema, tests)


def compiled(schema: Any, words: Vocabulary, seconds: list[float]) -> LLMatcher:
    """As the engine compiles it. Adds its milliseconds."""
    start = time.perf_counter()
    text = grammar_text(Constraint.json_schema(schema))
    matcher = LLMatcher(words.matching, text, log_level=0)
    if matcher.is_error():
        raise compile_error(matcher.get_error())
    refuse_empty(matcher)
    seconds.append((time.perf_counter() - start) * 1e3)
    return matcher


def compiled_alone(schema: Any, words: Vocabulary) -> LLMatcher:
    """As llguidance compiles it, with the same space between parts."""
    if not isinstance(schema, dict):
        raise RequestError("not an object")
    options: dict[str, Any] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    text = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)  # type: ignore[arg-type]
    matcher = LLMatcher(words.matching, text, log_level=0)
    if matcher.is_error():
        raise RequestError(matcher.get_error())
    return matcher


def judged(cases: list[Case], compile_: Compile, words: Vocabulary) -> Counts:
    """What a side makes of all cases."""
    counts = Counts()
    for case in cases:
        counts.schemas += 1
        try:
            matcher = compile_(case.schema)
        except RequestError as error:
            counts.refused[reason(error)] += 1
            continue
        counts.served += 1
        counts.served_names.append(case.name)
        for data, valid, shows in case.tests:
            text = json.dumps(data, ensure_ascii=False)
            if any("\ud800" <= character <= "\udfff" for character in text):
                continue  # no text at all
            fits = accepts(matcher, words.tokens(text))
            if valid:
                counts.valid += 1
                counts.accepted += fits
                counts.accepted_in_its_order += fits or any(map(ends, in_order(matcher, data, words)))
            else:
                counts.invalid += 1
                if fits:
                    counts.invalid_accepted.append(f"{case.name}: {shows}")
    return counts


def accepts(matcher: LLMatcher, tokens: list[int]) -> bool:
    """Whether the tokens are a whole text of the grammar."""
    trial = matcher.deep_copy()
    return trial.try_consume_tokens(tokens) == len(tokens) and ends(trial)


def ends(matcher: LLMatcher) -> bool:
    """Whether the text may end here."""
    return matcher.is_accepting()


def in_order(matcher: LLMatcher, value: Any, words: Vocabulary) -> Iterator[LLMatcher]:
    """Matchers after a value, with the properties of its objects in the grammar's order."""
    if isinstance(value, dict):
        if (inside := after(matcher, "{", words)) is not None:
            yield from properties_in_order(inside, value, words, "")
    elif isinstance(value, list):
        yield from items_in_order(matcher, "[", value, words)
    elif (left := after(matcher, json.dumps(value, ensure_ascii=False), words)) is not None:
        yield left


def items_in_order(matcher: LLMatcher, before: str, left: list[Any], words: Vocabulary) -> Iterator[LLMatcher]:
    """Matchers after the rest of a list."""
    if (begun := after(matcher, before if left else before.replace(", ", "") + "]", words)) is None:
        return
    if not left:
        yield begun
        return
    for read in in_order(begun, left[0], words):
        yield from items_in_order(read, ", ", left[1:], words)


def properties_in_order(
    matcher: LLMatcher, left: dict[str, Any], words: Vocabulary, before: str
) -> Iterator[LLMatcher]:
    """Matchers after the rest of an object."""
    if not left:
        if (end := after(matcher, "}", words)) is not None:
            yield end
        return
    starts = {name: f"{json.dumps(name, ensure_ascii=False)}: " for name in left}
    begun = {name: after(matcher, before + start, words) for name, start in starts.items()}
    possible = {name: start for name, start in begun.items() if start is not None}
    for name, start in possible.items():
        for read in in_order(start, left[name], words):
            # The first one in the grammar's order leaves all others that could come.
            if all(after(read, ", " + starts[other], words) for other in possible if other != name):
                rest = {other: value for other, value in left.items() if other != name}
                yield from properties_in_order(read, rest, words, ", ")
                return


def after(matcher: LLMatcher, text: str, words: Vocabulary) -> LLMatcher | None:
    """A copy that has read a text; None where it cannot."""
    trial = matcher.deep_copy()
    tokens = words.byte_tokens(text)
    return trial if trial.try_consume_tokens(tokens) == len(tokens) else None


def measure_masks(cases: list[Case], words: Vocabulary, masks: list[float]) -> None:
    """Add the microseconds of every mask on the way through the instances that are accepted."""
    mask = allocate_token_bitmask(1, words.size)
    gc.disable()
    for case in cases:
        try:
            matcher = compiled(case.schema, words, [])
        except RequestError:
            continue
        for data, valid, _ in case.tests:
            text = json.dumps(data, ensure_ascii=False)
            if not valid or any("\ud800" <= character <= "\udfff" for character in text):
                continue
            trial = matcher.deep_copy()
            for token in [*words.tokens(text), None]:
                start = time.perf_counter()
                fill_next_token_bitmask(trial, mask, 0)
                masks.append((time.perf_counter() - start) * 1e6)
                if token is None or not mask[0, token >> 5] >> (token & 31) & 1:
                    break
                trial.consume_token(token)
    gc.enable()


def reason(error: RequestError) -> str:
    """A message without its places and numbers."""
    text = str(error).removeprefix("constraint")
    words = text.replace(":", " ").split()
    key = words[0].rpartition("/")[2] if words and words[0].startswith("#") else ""
    return key or " ".join(words[:9])[:80]


def told(counts: Counts) -> dict[str, Any]:
    """For the results file."""
    return {
        "schemas": counts.schemas,
        "served": counts.served,
        "valid": counts.valid,
        "valid accepted": counts.accepted,
        "valid accepted, properties in the grammar's order": counts.accepted_in_its_order,
        "invalid": counts.invalid,
        "invalid accepted": counts.invalid_accepted,
        "refused": dict(counts.refused.most_common(12)),
    }


def line(title: str, counts: Counts) -> str:
    """For the terminal."""
    return (
        f"{title:42} served {counts.served}/{counts.schemas} ({counts.served / counts.schemas:.1%}),"
        f" valid accepted {counts.accepted}/{counts.valid}, in the grammar's order {counts.accepted_in_its_order},"
        f" invalid accepted {len(counts.invalid_accepted)}/{counts.invalid}"
    )


def figures(values: list[float]) -> dict[str, float]:
    """How many, and their percentiles."""
    p50, p90, p99, p999 = (round(float(p), 2) for p in np.percentile(values, (50, 90, 99, 99.9)))
    return {"count": len(values), "p50": p50, "p90": p90, "p99": p99, "p99.9": p999, "max": round(max(values), 2)}


if __name__ == "__main__":
    main()
