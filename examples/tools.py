"""A tool that the model calls, and JSON that always validates, with OpenAI's client.

headrace demo                                        # or: headrace serve PATH_OR_HUB_ID
python examples/tools.py http://127.0.0.1:8000
"""

import json
import sys
from typing import Any

import openai

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Where a person is now.",
            "parameters": {
                "type": "object",
                "properties": {"who": {"type": "string", "maxLength": 8}},
                "required": ["who"],
                "additionalProperties": False,
            },
        },
    }
]
PLACES = {"Mia": "at the mill", "Finn": "at the garden"}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "thing": {"enum": ["kite", "lamp", "drum"]}},
    "required": ["name", "thing"],
    "additionalProperties": False,
}


def main(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "Where can I find Mia?"}]
    asked: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 64}
    answer = client.chat.completions.create(messages=messages, tools=TOOLS, tool_choice="required", **asked)
    [call, *_] = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    print(f"the model calls {call.function.name} with {arguments}")
    messages.append(answer.choices[0].message.model_dump(exclude_none=True))
    place = PLACES.get(arguments["who"], "nowhere")
    messages.append({"role": "tool", "tool_call_id": call.id, "content": place})
    print(client.chat.completions.create(messages=messages, tools=TOOLS, **asked).choices[0].message.content)
    form: Any = {"type": "json_schema", "json_schema": {"name": "owner", "schema": SCHEMA}}
    question: list[Any] = [{"role": "user", "content": "Write as JSON: Mia has the kite."}]
    text = client.chat.completions.create(messages=question, response_format=form, **asked).choices[0].message.content
    print("as JSON:", json.loads(text))


if __name__ == "__main__":
    main(sys.argv[1])
