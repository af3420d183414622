"""OpenAI's own client with a headrace server: a streamed chat, and a completion with its log-probabilities.

headrace serve runs/demo/hf
python examples/openai_client.py http://127.0.0.1:8000
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(url: str) -> None:
    """Talk to the first model that the server lists."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is 3 plus 4?"}],
        max_tokens=20,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    answer = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, seed=7, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs
    for token, logprob in zip(logprobs.tokens, logprobs.token_logprobs):
        print(f"{token!r:12} {logprob:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
