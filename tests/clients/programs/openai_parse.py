"""Calls openai's own helpers for typed answers: JSON in the one argument, JSON on the last line."""

import json
import sys
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field

asked = json.loads(sys.argv[1])
client = openai.OpenAI(base_url=asked["url"] + "/v1", api_key="none", max_retries=0)
given: dict[str, Any] = {"model": "tiny", "messages": asked["messages"], "temperature": 0, "max_tokens": 150}


class Thing(BaseModel):
    """A thing, and how many of it."""

    what: Literal["cup", "key", "lamp"]
    count: int = Field(ge=0, le=99)


class Person(BaseModel):
    """What a person owns."""

    name: Literal["Mia", "Finn"]
    home: Literal["mill"] | None
    things: list[Thing] = Field(max_length=2)


class find(BaseModel):
    """Where a person is."""

    who: Literal["Mia", "Finn"]


def refusal(**fields):
    """The class of an answer's error."""
    try:
        client.chat.completions.parse(**given | fields)
    except openai.OpenAIError as error:
        return type(error).__name__


def parsed_calls(message):
    """The calls of a message, by their own type."""
    calls = message.tool_calls or []
    return [[call.function.name, call.function.parsed_arguments.model_dump()] for call in calls]


whole: Any = client.chat.completions.parse(**given, response_format=Person).choices[0].message
with client.chat.completions.stream(**given, response_format=Person) as stream:
    kinds = [event.type for event in stream]
    streamed: Any = stream.get_final_completion().choices[0].message

tools: Any = {"tools": [openai.pydantic_function_tool(find)], "tool_choice": "required", "parallel_tool_calls": False}
called: Any = client.chat.completions.parse(**given, **tools).choices[0].message
with client.chat.completions.stream(**given, **tools) as stream:
    call_kinds = [event.type for event in stream]
    streamed_call: Any = stream.get_final_completion().choices[0].message
back = [
    *asked["messages"],
    called.to_dict(),
    {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "at the mill"},
]
after: Any = client.chat.completions.parse(**given | {"messages": back}, response_format=Person).choices[0].message

print(
    json.dumps(
        {
            "version": openai.__version__,
            "whole": whole.parsed.model_dump(),
            "content": whole.content,
            "streamed": [streamed.parsed.model_dump(), streamed.content],
            "kinds": sorted(set(kinds)),
            "calls": parsed_calls(called),
            "streamed_calls": parsed_calls(streamed_call),
            "call_kinds": sorted(set(call_kinds)),
            "after": after.parsed.model_dump(),
            "cut": refusal(response_format=Person, max_tokens=3),
        }
    )
)
