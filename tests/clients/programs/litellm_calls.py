"""Calls litellm: JSON in the one argument, JSON on the last line."""

import json
import sys
from typing import Any

import litellm

asked = json.loads(sys.argv[1])
base = {"api_base": asked["url"] + "/v1", "api_key": "none", "num_retries": 0}
greedy = {"model": "openai/tiny", "temperature": 0, "max_tokens": asked["tokens"], "logprobs": True, **base}
streamed = {"stream": True, "stream_options": {"include_usage": True}}


def usage(answer):
    """Tokens of the prompt, and of the answer."""
    return [answer.usage.prompt_tokens, answer.usage.completion_tokens]


def whole(answer, text):
    """What an answer says."""
    [choice] = answer.choices
    return {
        "text": text(choice),
        "finish": choice.finish_reason,
        "usage": usage(answer),
        "model": answer.model,
        "fingerprint": answer.system_fingerprint,
    }


def in_parts(chunks, text):
    """What a stream says, and in how many parts."""
    chunks = list(chunks)
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    [last] = [part.finish_reason for part in parts if part.finish_reason]
    return {
        "text": "".join(text(part) or "" for part in parts),
        "finish": last,
        "usage": usage(chunks[-1]),
        "parts": sum(bool(text(part)) for part in parts),
    }


def refusal(**fields):
    """How a request failed."""
    try:
        answer = litellm.completion(**{"messages": asked["messages"]} | greedy | fields)
        return list(answer)
    except Exception as error:
        told: Any = error  # one of litellm's classes, which have a status
        return [type(error).__name__, told.status_code, str(error)]


def overflow(**fields):
    """The class of a chat's error that is too long."""
    return refusal(messages=[{"role": "user", "content": "word " * 20_000}], **fields)[0]


def content(choice):
    """A message's text."""
    return choice.message.content


def delta(choice):
    """A part's text."""
    return choice.delta.content


def plain(choice):
    """A completion's text."""
    return choice.text


chat = litellm.completion(messages=asked["messages"], **greedy)
completion = litellm.text_completion(prompt=asked["prompt"], **greedy | {"logprobs": 1})
print(
    json.dumps(
        {
            "chat": whole(chat, content) | {"scores": [token["logprob"] for token in chat.choices[0].logprobs.content]},
            "completion": whole(completion, plain) | {"scores": completion.choices[0].logprobs.token_logprobs},
            "chat_stream": in_parts(litellm.completion(messages=asked["messages"], **greedy, **streamed), delta),
            "completion_stream": in_parts(
                litellm.text_completion(prompt=asked["prompt"], **greedy | {"logprobs": None}, **streamed), plain
            ),
            "embedding": litellm.embedding(model="openai/tiny", input=[asked["prompt"]], **base).data[0]["embedding"],
            "missing": refusal(model="openai/another"),
            "wrong": refusal(temperature=-1),
            "overflows": [overflow(), overflow(stream=True), refusal(max_tokens=100_000)[0]],
        }
    )
)
