"""Runs agents of pydantic-ai: JSON in the one argument, JSON on the last line."""

import json
import sys
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

asked = json.loads(sys.argv[1])
model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=asked["url"] + "/v1", api_key="none"))
settings = ModelSettings(temperature=0, max_tokens=150, parallel_tool_calls=False)
Name = Literal["Mia", "Finn"]


class Person(BaseModel, extra="forbid"):
    """What a person owns."""

    name: Name
    coins: int = Field(ge=0, le=99)


def agent(output: Any, **options: Any) -> Any:
    """One that gives no second try."""
    return Agent(model, output_type=output, model_settings=settings, retries=0, **options)


calls: list[str] = []


def find(who: Name) -> str:
    """Where a person is."""
    calls.append(who)
    return f"{who} is at the mill"


async def until_found(_: Any, tools: Any) -> Any:
    """The tool, until it has been called."""
    return [] if calls else tools


async def when_found(_: Any, tools: Any) -> Any:
    """The output, once the tool has been called."""
    return tools if calls else []


def with_tool() -> Any:
    """An agent that must call the tool, and then give its output."""
    from pydantic_ai.capabilities import PrepareOutputTools, PrepareTools

    return agent(
        ToolOutput(Person), tools=[find], capabilities=[PrepareTools(until_found), PrepareOutputTools(when_found)]
    )


def kinds(result: Any) -> list[str]:
    """The parts of a run's messages."""
    return [part.part_kind for message in result.all_messages() for part in message.parts]


by_tool = agent(ToolOutput(Person)).run_sync(asked["prompt"])
native = agent(NativeOutput(Person)).run_sync(asked["prompt"])
found = with_tool().run_sync(asked["prompt"])
print(
    json.dumps(
        {
            "by_tool": by_tool.output.model_dump(),
            "native": native.output.model_dump(),
            "found": found.output.model_dump(),
            "calls": calls,
            "kinds": kinds(found),
            "requests": [by_tool.usage.requests, native.usage.requests, found.usage.requests],
        }
    )
)
