"""Answers of a random model under real schemas: each that ended by itself is valid, by another library."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from headrace import LLM, Constraint, RequestError, SamplingParams
from headrace.bench.models import random_checkpoint
from headrace.dialects.base import AnswerShape, ToolChoice
from headrace.dialects.choose import DIALECTS
from headrace.dialects.grammar import answer_constraint
from headrace.dialects.request import described_tools
from headrace.llm.chat import chat_output

TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
"""The types of BFCL's schemas that are not JSON Schema's."""
CLOSING = '"]}0 ,'
TOKENS = 160
FEWEST_ENDED = 0.2


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(random_checkpoint("tiny", tmp_path_factory.mktemp("tiny") / "tiny"), kv_cache_memory="64MiB")


def schemas(data_dir) -> list[Any]:
    """MaskBench's."""
    with tarfile.open(data_dir / "schema" / "schema_cases.tar.gz") as archive:
        members = sorted((m for m in archive if "maskbench/" in m.name and m.name.endswith(".json")), key=str)
        return [json.loads(archive.extractfile(member).read())["schema"] for member in members]  # type: ignore[union-attr]


def functions(data_dir) -> Iterator[list[dict[str, Any]]]:
    """The functions of each of BFCL's questions."""
    with tarfile.open(data_dir / "schema" / "schema_cases.tar.gz") as archive:
        for name in ("simple_python", "multiple", "parallel"):
            [member] = [m for m in archive.getmembers() if m.name.endswith(f"bfcl/BFCL_v4_{name}.json")]
            for line in archive.extractfile(member).read().decode().splitlines():  # type: ignore[union-attr]
                yield [{"type": "function", "function": plain(one)} for one in json.loads(line)["function"]]


def plain(value: Any) -> Any:
    """A description with JSON Schema's types."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name: plain(item) for name, item in value.items() if name not in ("response", "default", "optional")}
    if isinstance(found.get("type"), str) and found["type"] in TYPES:
        found["type"] = TYPES[found["type"]]
        if found["type"] is None:
            del found["type"]
    return found


def closing(llm) -> dict[int, float]:
    """A bias to tokens that end strings and objects, or a random model would never end."""
    return {llm.tokenizer.encode(text, add_special_tokens=False)[0]: 6.0 for text in CLOSING}


COUNTS = [200, pytest.param(10_000, marks=pytest.mark.soak)]


@pytest.mark.parametrize("count", COUNTS)
def test_answers_under_real_schemas_validate(data_dir, llm, count):
    every = schemas(data_dir)
    bias, ends, number = closing(llm), Counter[str](), 0
    while ends.total() < count:
        schema = every[(number * 37) % len(every)]
        number += 1
        params = SamplingParams(
            constraint=Constraint.json_schema(schema), max_tokens=TOKENS, seed=number, n=4, logit_bias=bias
        )
        try:
            output = llm.generate([[5, 6, 7]], params)[0]
        except RequestError:
            ends["refused"] += 1
            continue
        for choice in output.outputs:
            ends[str(choice.finish_reason)] += 1
            if choice.finish_reason == "stop":
                jsonschema.validate(json.loads(choice.text), schema)
    assert ends["stop"] >= FEWEST_ENDED * count, ends


@pytest.mark.parametrize("count", COUNTS)
def test_calls_of_real_functions_parse_and_validate(data_dir, llm, count):
    every = list(functions(data_dir))
    bias, ends, number = closing(llm), Counter[str](), 0
    while ends.total() < count:
        described = every[(number * 37) % len(every)]
        dialect = DIALECTS[("hermes", "llama3", "mistral")[number % 3]]
        number += 1
        tools = described_tools(
            [{**one, "function": {**one["function"], "name": f"f{i}"}} for i, one in enumerate(described)]
        )
        shape = AnswerShape(dialect, tools, ToolChoice("required"))
        constraint = answer_constraint(shape, lambda text: None)
        params = SamplingParams(constraint=constraint, max_tokens=TOKENS, seed=number, n=4, logit_bias=bias)
        try:
            output = chat_output(llm.generate([[5, 6, 7]], params)[0], shape)
        except RequestError:
            ends["refused"] += 1
            continue
        by_name = {tool.name: json.loads(tool.schema) for tool in tools}
        for choice, message in zip(output.outputs, output.messages):
            ends[str(choice.finish_reason)] += 1
            if choice.finish_reason == "stop":
                assert message.tool_calls and not message.content
                for call in message.tool_calls:
                    jsonschema.validate(json.loads(call.arguments), by_name[call.name])
    assert ends["stop"] >= FEWEST_ENDED * count, ends
