"""`LLM.chat` with tools, and the same constraints in `LLM.generate`, `LLM.stream`, `AsyncLLM` and resume records."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from headrace import LLM, AsyncLLM, Constraint, RequestError, ResumeRecord, SamplingParams

WHO: dict[str, Any] = {
    "type": "object",
    "properties": {"who": {"enum": ["Mia", "Finn"]}, "n": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["who", "n"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": WHO}}]
ASK = [{"role": "user", "content": "Where can I find Mia?"}]
SAYS = {
    **WHO,
    "properties": {**WHO["properties"], "say": {"type": "string", "minLength": 16}},
    "required": ["who", "say"],
}
PARAMS = SamplingParams(constraint=Constraint.json_schema(SAYS), max_tokens=70, seed=3, logprobs=1, n=2)


@pytest.fixture(scope="module")
def llm(tinyworld_checkpoint):
    with LLM(tinyworld_checkpoint, threads=1, kv_cache_memory="16MiB") as made:
        yield made


def test_a_call_is_valid_and_its_ids_stay(llm):
    asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    output = llm.chat(ASK, SamplingParams(max_tokens=90, seed=1), **asked)
    [message] = output.messages
    [call] = message.tool_calls
    assert call.name == "find" and json.loads(call.arguments)["who"] in ("Mia", "Finn")
    assert message.content == "" and call.id.startswith("call_")
    assert output.outputs[0].text.lstrip().startswith("<tool_call>")


def test_a_named_tool_and_none(llm):
    named = {"type": "function", "function": {"name": "find"}}
    output = llm.chat(ASK, SamplingParams(max_tokens=90, seed=2), tools=TOOLS, tool_choice=named)
    assert [call.name for call in output.messages[0].tool_calls] == ["find"]
    plain = llm.chat(ASK, SamplingParams(max_tokens=8, seed=2), tools=TOOLS, tool_choice="none")
    assert plain.messages[0].tool_calls == [] and plain.messages[0].content == plain.outputs[0].text


def test_content_of_a_chat_is_constrained(llm):
    [message] = llm.chat(ASK, SamplingParams(constraint=Constraint.json_schema(WHO), max_tokens=60, seed=1)).messages
    assert json.loads(message.content).keys() == WHO["properties"].keys()


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "lose"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"uniqueItems": True}}}]},
            "tools",
        ),
    ],
)
def test_wrong_tools_are_named(llm, asked, param):
    with pytest.raises(RequestError) as caught:
        llm.chat(ASK, SamplingParams(max_tokens=4), **asked)
    assert caught.value.param == param


def test_every_way_to_ask_gives_the_same_tokens(llm, tinyworld_checkpoint):
    expected = llm.generate("Once", PARAMS)[0].outputs
    *_, last = llm.stream("Once", PARAMS)
    assert last.outputs == expected

    async def ask():
        async with AsyncLLM(tinyworld_checkpoint, threads=1, kv_cache_memory="16MiB") as engine:
            outputs = await asyncio.gather(*(engine.generate("Once", PARAMS) for _ in range(3)))
            with pytest.raises(RequestError, match="lookahead"):
                await engine.generate("Once", SamplingParams(constraint=Constraint.regex("(?=a)b")))
            return outputs

    assert all(output.outputs == expected for output in asyncio.run(ask()))


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_a_record_of_a_constrained_request_survives_json(llm, steps):
    expected = llm.generate("Once", PARAMS)[0].outputs
    name = llm.frontend.add("Once", PARAMS)
    for _ in range(steps):
        llm.frontend.step()
    record = ResumeRecord.from_dict(json.loads(json.dumps(llm.frontend.resume_record(name).to_dict())))
    llm.frontend.abort(name)
    assert record.params == PARAMS
    assert llm.resume([record])[0].outputs == expected


def test_a_record_with_one_broken_choice_leaves_nothing_behind(llm):
    name = llm.frontend.add("Once", PARAMS)
    for _ in range(3):
        llm.frontend.step()
    record = llm.frontend.resume_record(name)
    llm.frontend.abort(name)
    record.output.outputs[1].token_ids = [9, 9, 9, 9]
    with pytest.raises(RequestError, match="does not satisfy"):
        llm.resume([record])
    assert not llm.frontend.has_work


def test_a_dead_end_ends_its_choice_alone(llm):
    stuck = SamplingParams(constraint=Constraint.choice(["no"]), min_tokens=30, max_tokens=40, n=2)
    free = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
    [dead, alive] = llm.generate(["Once", "Once"], [stuck, free])
    for choice in dead.outputs:
        assert choice.finish_reason == "error" and str(choice.stop_reason).startswith("constraint, min_tokens: ")
    assert alive.outputs[0].finish_reason == "length" and len(alive.outputs[0].token_ids) == 6
