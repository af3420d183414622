"""Calls LangChain: JSON in the one argument, JSON on the last line."""

import json
import sys
from typing import Any, Literal

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

asked = json.loads(sys.argv[1])
base = {"base_url": asked["url"] + "/v1", "api_key": "none", "max_retries": 0, "model": "tiny"}
greedy = {"temperature": 0, "max_tokens": asked["tokens"], **base}
chat = ChatOpenAI(**greedy)


def refusal(call):
    """How a call failed: its error's class, and whether that is LangChain's own for an overflow."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, isinstance(error, ContextOverflowError)]


class Person(BaseModel, extra="forbid"):
    """What a person owns."""

    name: Literal["Mia", "Finn"]
    coins: int = Field(ge=0, le=99)


class find(BaseModel, extra="forbid"):
    """Where a person is."""

    who: Literal["Mia", "Finn"]


def structured(method):
    """A typed answer."""
    found: Any = roomy.with_structured_output(Person, method=method).invoke(asked["prompt"])
    return found.model_dump()


def called(**options):
    """The calls of an answer: name and arguments."""
    answer = roomy.bind_tools([find], **options).invoke(asked["prompt"])
    return [[call["name"], call["args"]] for call in answer.tool_calls]


def streamed_call():
    """The same of a stream's parts, added up."""
    whole: Any = None
    for part in roomy.bind_tools([find], tool_choice="find").stream(asked["prompt"]):
        whole = part if whole is None else whole + part
    return [[call["name"], call["args"]] for call in whole.tool_calls]


def answer_to_call():
    """A typed answer after a call and what the tool has said."""
    call = roomy.bind_tools([find], tool_choice="find").invoke(asked["prompt"])
    said = ToolMessage("at the mill", tool_call_id=call.tool_calls[0]["id"])
    found: Any = roomy.with_structured_output(Person).invoke([HumanMessage(asked["prompt"]), call, said])
    return found.model_dump()


roomy = ChatOpenAI(**greedy | {"max_tokens": 150})
long = "word " * 20_000
embeddings = OpenAIEmbeddings(check_embedding_ctx_length=False, **base)
print(
    json.dumps(
        {
            "chat": chat.invoke(asked["prompt"]).content,
            "stream": "".join(chunk.content for chunk in chat.stream(asked["prompt"])),
            "completion": OpenAI(**greedy).invoke(asked["prompt"]),
            "several": OpenAI(n=2, best_of=2, **greedy).generate([asked["prompt"]]).generations[0][0].text,
            "embedding": embeddings.embed_query(asked["prompt"]),
            "structured": {method: structured(method) for method in ("json_schema", "function_calling")},
            "called": {choice: called(tool_choice=choice) for choice in ("find", "any")},
            "one": called(tool_choice="any", parallel_tool_calls=False),
            "streamed_call": streamed_call(),
            "after_call": answer_to_call(),
            "wrong": refusal(lambda: ChatOpenAI(**greedy | {"temperature": -1}).invoke("a")),
            "overflows": [
                refusal(lambda: chat.invoke(long)),
                refusal(lambda: list(chat.stream(long))),
                refusal(lambda: ChatOpenAI(**greedy | {"max_tokens": 100_000}).invoke("a")),
            ],
        }
    )
)
