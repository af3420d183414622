"""litellm's openai provider reads what the engine says, whole and streamed, and errors by their own classes."""

import pytest

from headrace import SamplingParams

MESSAGES = [{"role": "user", "content": "Where does Mia live?"}]
PROMPT = "Once upon a time,"
TOKENS = 12


@pytest.fixture(scope="module")
def told(clients, server):
    return clients.program("litellm_calls.py", url=server.url, messages=MESSAGES, prompt=PROMPT, tokens=TOKENS)


def generated(llm, prompt):
    """(text, why it ended, [tokens of the prompt, of the answer], log-probabilities) by the engine in this process."""
    output = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=0))[0]
    [choice] = output.outputs
    return (
        choice.text,
        choice.finish_reason,
        [len(output.prompt_token_ids), len(choice.token_ids)],
        [table[token].logprob for token, table in zip(choice.token_ids, choice.logprobs)],
    )


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_answers_are_the_engines(told, llm, kind):
    text, finish, usage, scores = generated(llm, llm.chat_prompt(MESSAGES) if kind == "chat" else PROMPT)
    assert text
    assert told[kind] == {
        "text": text,
        "finish": finish,
        "usage": usage,
        "scores": scores,
        "model": "tiny",
        "fingerprint": llm.fingerprint,
    }
    stream = told[f"{kind}_stream"]
    assert stream.pop("parts") > 1
    assert stream == {"text": text, "finish": finish, "usage": usage}


def test_embeddings(told, server):
    assert told["embedding"] == server.post("/v1/embeddings", model="tiny", input=PROMPT).json()["data"][0]["embedding"]


def test_errors_keep_their_classes_and_their_words(told):
    name, status, text = told["missing"]
    assert (name, status) == ("NotFoundError", 404) and "model 'another' does not exist" in text
    name, status, text = told["wrong"]
    assert (name, status) == ("BadRequestError", 400) and "temperature" in text


def test_a_request_longer_than_the_context_is_litellms_own_error(told):
    assert told["overflows"] == ["ContextWindowExceededError"] * 3
