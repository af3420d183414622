"""Calls LangChain: JSON in the one argument, JSON on the last line."""

import json
import sys

from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

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
            "wrong": refusal(lambda: ChatOpenAI(**greedy | {"temperature": -1}).invoke("a")),
            "overflows": [
                refusal(lambda: chat.invoke(long)),
                refusal(lambda: list(chat.stream(long))),
                refusal(lambda: ChatOpenAI(**greedy | {"max_tokens": 100_000}).invoke("a")),
            ],
        }
    )
)
