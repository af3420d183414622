"""LangChain's models of OpenAI read what the engine says, and an overflow as their own error."""

import pytest

from headrace import SamplingParams

PROMPT = "Where does Mia live?"
TOKENS = 12


@pytest.fixture(scope="module")
def told(clients, server):
    return clients.program("langchain_calls.py", url=server.url, prompt=PROMPT, tokens=TOKENS)


def test_answers_are_the_engines(told, llm, server):
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    chat = llm.chat([{"role": "user", "content": PROMPT}], params).outputs[0].text
    assert chat and told["chat"] == told["stream"] == chat
    completion = llm.generate(PROMPT, params)[0].outputs[0].text
    assert told["completion"] == told["several"] == completion
    [answer] = server.post("/v1/embeddings", input=PROMPT).json()["data"]
    assert told["embedding"] == answer["embedding"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_typed_answers_are_of_their_type(told, method):
    person = told["structured"][method]
    assert person["name"] in ("Mia", "Finn") and 0 <= person["coins"] <= 99


def test_calls_of_bound_tools_are_valid(told):
    [[name, arguments]] = told["called"]["find"]
    assert name == "find" and arguments["who"] in ("Mia", "Finn")
    assert told["streamed_call"] == told["called"]["find"]
    assert told["called"]["any"] and all(
        name == "find" and arguments["who"] in ("Mia", "Finn") for name, arguments in told["called"]["any"]
    )
    assert len(told["one"]) == 1
    assert told["after_call"]["name"] in ("Mia", "Finn"), "the call and its result were sent back"


def test_a_request_longer_than_the_context_is_langchains_own_error(told):
    assert told["overflows"] == [["OpenAIContextOverflowError", True]] * 3
    assert told["wrong"] == ["OpenAIInvalidRequestError", False]
