"""openai's helpers give typed answers and typed calls, whole and streamed, in two versions of the client."""

import json
import sys

import pytest

from clients.client_kit import PROGRAMS
from headrace import SamplingParams
from headrace.engine.schedule.constraint import Constraint

MESSAGES = [{"role": "user", "content": "What does Mia own?"}]


@pytest.fixture(scope="module", params=["the clients' own", "the tests' own"])
def told(request, clients, server):
    fields = {"url": server.url, "messages": MESSAGES}
    if request.param == "the clients' own":
        return clients.program("openai_parse.py", **fields)
    return json.loads(clients.run(sys.executable, PROGRAMS / "openai_parse.py", json.dumps(fields)).splitlines()[-1])


def closed(properties):
    """The schema of an object that has these and no others."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def test_an_answer_is_of_its_type_whole_and_streamed(told, llm):
    whole = told["whole"]
    assert whole["name"] in ("Mia", "Finn") and whole["home"] in ("mill", None) and len(whole["things"]) <= 2
    assert told["streamed"] == [whole, told["content"]] and json.loads(told["content"]) == whole
    assert {"chunk", "content.delta", "content.done"} <= set(told["kinds"])
    # The engine, held to the same JSON by another schema, says the same.
    thing = {"what": {"enum": ["cup", "key", "lamp"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}}
    person = {
        "name": {"enum": ["Mia", "Finn"]},
        "home": {"enum": ["mill", None]},
        "things": {"type": "array", "items": closed(thing), "maxItems": 2},
    }
    params = SamplingParams(temperature=0.0, max_tokens=150, constraint=Constraint.json_schema(closed(person)))
    assert json.loads(llm.generate(llm.chat_prompt(MESSAGES), params)[0].outputs[0].text) == whole


def test_a_call_is_of_its_type_whole_and_streamed(told):
    [[name, arguments]] = told["calls"]
    assert name == "find" and arguments["who"] in ("Mia", "Finn")
    assert told["streamed_calls"] == told["calls"]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= set(told["call_kinds"])
    assert told["after"]["name"] in ("Mia", "Finn"), "the call and its result were sent back"


def test_an_answer_that_is_cut_is_the_client_s_own_error(told):
    assert told["cut"] == "LengthFinishReasonError"
