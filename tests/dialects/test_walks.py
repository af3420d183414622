"""Random answers of the grammar are read by the parser, and their arguments are valid."""

import json
import random

import jsonschema_rs
import numpy as np
import pytest

from dialects.dialect_kit import (
    AUTO,
    MARKERS,
    MARKS,
    NAMED,
    REQUIRED,
    SCHEMAS,
    Vocabulary,
    answer,
    matcher,
    shape_of,
    vocabulary,
)
from headrace.dialects.base import AnswerShape
from headrace.dialects.choose import DIALECTS
from headrace.engine.schedule.constraint import Constraint

STEPS = 250
ENDS = [ord(c) for c in '"}],:']
CHECKS = {name: jsonschema_rs.validator_for(schema) for name, schema in SCHEMAS.items()}
CONTENT = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
KINDS = {"auto": (AUTO, None), "required": (REQUIRED, None), "named": (NAMED, None), "content": (AUTO, CONTENT)}


def walk(shape: AnswerShape, marks, draw: random.Random) -> tuple[str, bool]:
    """A text of random allowed tokens, and whether it ended in its steps. Markers and ends of strings are likelier."""
    kit, _ = vocabulary(marks)
    found = matcher(shape, marks)
    marked = [i for i, token in enumerate(kit.tokens) if token.decode("latin1") in MARKERS]
    taken: list[int] = []
    for _ in range(STEPS):
        words = np.frombuffer(found.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(words, bitorder="little")[: len(kit.tokens)]).tolist()
        if kit.eos_token_id in allowed and (len(allowed) == 1 or draw.random() < 0.1):
            return text_of(kit, taken), True
        likely = [i for i in (marked if draw.random() < 0.5 else ENDS) if i in allowed]
        token = draw.choice(likely) if likely and draw.random() < 0.5 else draw.choice(allowed)
        if token == kit.eos_token_id:
            continue
        assert found.consume_token(token), found.get_error()
        taken.append(token)
    return text_of(kit, taken), False


def text_of(kit: Vocabulary, ids: list[int]) -> str:
    return b"".join(kit.tokens[i] for i in ids).decode(errors="ignore")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("reasoning", [None, "may begin", "begun"])
def test_random_answers_are_read(dialect, kind, parallel, reasoning):
    choice, content = KINDS[kind]
    constraint = None if content is None else Constraint.json_schema(content)
    shape = shape_of(dialect, choice, parallel, reasoning, constraint)
    draw = random.Random(f"{dialect}{kind}{parallel}{reasoning}")
    for marks in MARKS:
        for _ in range(3):
            text, ended = walk(shape, marks, draw)
            found = answer(shape, text)
            assert answer(shape, *text) == found, text
            for name, arguments in found.calls if ended else found.calls[:-1]:
                assert CHECKS[name].is_valid(json.loads(arguments)), text
            assert not shape.once or len(found.calls) <= 1
            assert choice.name is None or {name for name, _ in found.calls} <= {choice.name}
            if choice.mode == "required":
                assert found.content == "" and (found.calls or not ended), text
            if ended and content is not None:
                assert bool(found.calls) != (found.content != ""), text
                assert found.calls or jsonschema_rs.is_valid(content, json.loads(found.content)), text
            if reasoning == "begun" and ended:
                assert text.partition("</think>")[0].strip(" \n\r\t") == found.reasoning


def test_random_answers_have_calls_and_end():
    for dialect in DIALECTS:
        shape = shape_of(dialect, NAMED, reasoning="may begin")
        walks = [walk(shape, "added", random.Random(seed)) for seed in range(10)]
        assert sum(ended for _, ended in walks) >= 8
        assert sum(len(answer(shape, text).calls) for text, ended in walks if ended) >= 8
