"""The character profile of SGLang's JSON benchmark: its schema, and answers that were written by hand.

A random model writes no profiles, so its strings are held to the answers' lengths by patterns. The passes that jumping
forward saves are counted on the answers themselves, which are given token by token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.sampling import SamplingParams
from headrace.grammar.grammars import Grammars

__all__ = ["profile_answers", "profile_schema", "walk"]


def profile_schema() -> dict[str, Any]:
    """The JSON schema of a profile."""
    schema: dict[str, Any] = _data()["schema"]
    return schema


def profile_answers() -> list[str]:
    """Profiles that are valid under the schema, as JSON with ", " and ": "."""
    return [json.dumps(answer, ensure_ascii=False) for answer in _data()["answers"]]


def walk(grammars: Grammars, constraint: Constraint, answer: Sequence[int]) -> tuple[int, int]:
    """Give an answer's tokens to a mask; returns how many of them are forced, and how many are sampled.

    Raises ValueError where the answer does not go the way of the forced tokens, or is not in the language.
    """
    mask = grammars.mask(SamplingParams(constraint=constraint), ())
    known = forced = 0
    while known < len(answer):
        run = mask.forced()
        if list(answer[known : known + len(run)]) != run:
            raise ValueError(f"forced tokens {run} are not the answer's {list(answer[known : known + len(run)])}")
        mask.accept(run)
        known, forced = known + len(run), forced + len(run)
        if known < len(answer):
            mask.accept(answer[known : known + 1])
            known += 1
        if mask.failed is not None:
            raise ValueError(mask.failed)
    return forced, len(answer) - forced


def _data() -> Any:
    return json.loads(resources.files("headrace.bench").joinpath("profile.json").read_text(encoding="utf-8"))
