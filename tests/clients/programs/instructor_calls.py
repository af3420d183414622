"""Calls instructor: JSON in the one argument, JSON on the last line."""

import json
import sys
from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel, Field

asked = json.loads(sys.argv[1])
given: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 150, "max_retries": 0}
messages = {"messages": asked["messages"]}


def client(mode):
    """One whose answers are read in a mode."""
    made = openai.OpenAI(base_url=asked["url"] + "/v1", api_key="none", max_retries=0)
    return instructor.from_openai(made, mode=mode)


class Person(BaseModel, extra="forbid"):
    """What a person owns."""

    name: Literal["Mia", "Finn"]
    coins: int = Field(ge=0, le=99)
    things: list[Literal["cup", "key"]] = Field(max_length=2)


class Note(BaseModel):
    """Any object is one."""

    text: str = "nothing"


def refusal(mode, **fields):
    """The class of an answer's error."""
    try:
        client(mode).create(response_model=Person, **messages, **given | fields)
    except Exception as error:
        return type(error).__name__


modes = {name: instructor.Mode[name] for name in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA")}
made = {name: client(mode).create(response_model=Person, **messages, **given) for name, mode in modes.items()}
partial = list(client(modes["TOOLS"]).create_partial(response_model=Person, **messages, **given))
# In this mode the model alone decides which object it is.
braces: Any = {"extra_body": {"allowed_token_ids": asked["braces"]}}
note = client(instructor.Mode.JSON).create(response_model=Note, **messages, **given, **braces)
print(
    json.dumps(
        {
            "made": {name: person.model_dump() for name, person in made.items()},
            "partial": partial[-1].model_dump(),
            "parts": len(partial),
            "note": note.model_dump(),
            "cut": [refusal(mode, max_tokens=3) for mode in modes.values()],
        }
    )
)
