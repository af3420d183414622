"""`prediction`: the real `openai` client gets the same answers, and is told how many drafts were right."""

import json
from typing import Any

import openai
import pytest

from headrace.serve.protocol.fields import CHAT
from serve.http_kit import served, until

MESSAGES = [{"role": "user", "content": "Where does Mia live?"}]
STORY = "Once upon a time, there was a child called Mia, who lived in a small house near the sea. One day"
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
CALLS = "{{ messages[0].content }}{{ tools }}{# <tool_call> arguments #}"
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Paris"]}}, "required": ["city"]}
SCORED = {"logprobs": True, "top_logprobs": 2}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "scored": {"temperature": 0, **SCORED},
    "choices": {"n": 3, "seed": 5, **SCORED},
    "penalised": {"seed": 4, "frequency_penalty": 0.5},
    "stopped": {"temperature": 0, "stop": ["the", "e "]},
    "text": {"extra_body": {"structured_outputs": {"choice": ["it is near the sea", "it is far away"]}}, "seed": 1},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}, "seed": 2},
    "scored schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        "seed": 2,
        **SCORED,
    },
    "tools": {"tools": TOOLS, "tool_choice": "required", "extra_body": {"chat_template": CALLS}, "seed": 3},
}


@pytest.fixture(scope="module", params=["off", "ngram"])
def client(request, tinyworld_checkpoint):
    """One that drafts predictions as it sees fit, and one that drafts four tokens in every step."""
    flags = [] if request.param == "off" else ["--speculate", "ngram", "--gamma", "4"]
    with (
        served(tinyworld_checkpoint, "--served-model-name", "tiny", *flags) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def ask(client, text=None, content=STORY, **fields):
    """The answer to a chat, with `text` as its prediction."""
    more: dict[str, Any] = {} if text is None else {"prediction": {"type": "content", "content": text}}
    messages = [{"role": "user", "content": content}]
    sent = {"model": "tiny", "messages": messages, "max_tokens": 40, **fields, **more}
    return client.chat.completions.create(**sent)


def said(choice):
    """A choice without the ids of calls, which are drawn for each answer."""
    shown = choice.model_dump()
    for call in shown["message"]["tool_calls"] or ():
        call.pop("id")
    return shown


def text_of(answer):
    message = answer.choices[0].message
    return message.content or str(message.tool_calls)


def predictions(text):
    middle = len(text) // 2
    return {
        "right": text,
        "partly right": text[: middle // 2] + " and a ship" + text[middle // 2 : middle] + text[middle + 3 :],
        "wrong": "0123456789 " * 9,
        "empty": "",
        "parts": [{"type": "text", "text": text[:middle]}, {"type": "text", "text": text[middle:]}],
        "no parts": [],
        "huge": text * 3000,
        "special": "</s><|im_end|>" + text,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_the_same_whatever_is_predicted(client, kind):
    plain = ask(client, **KINDS[kind])
    assert plain.usage.completion_tokens_details is None
    for name, text in predictions(text_of(plain)).items():
        answer = ask(client, text, **KINDS[kind])
        assert [said(choice) for choice in answer.choices] == [said(choice) for choice in plain.choices], name
        assert answer.usage.completion_tokens == plain.usage.completion_tokens, name
        details = answer.usage.completion_tokens_details
        assert 0 <= details.accepted_prediction_tokens <= plain.usage.completion_tokens, name
        assert details.rejected_prediction_tokens >= 0 and details.reasoning_tokens is None, name


def test_drafts_are_accepted_where_the_prediction_is_right(client):
    text = text_of(ask(client, temperature=0))
    told = []

    def some_are_accepted():
        told.append(ask(client, text, temperature=0).usage.completion_tokens_details)
        return told[-1].accepted_prediction_tokens > 0

    until(some_are_accepted)
    assert told[-1].accepted_prediction_tokens > told[-1].rejected_prediction_tokens


@pytest.fixture(scope="module")
def eager(tinyworld_checkpoint):
    """A server that always drafts four tokens, if there are any."""
    with served(tinyworld_checkpoint, "--served-model-name", "tiny", "--speculate", "ngram", "--gamma", "4") as server:
        yield server


def post(server, text, **fields):
    sent = {"messages": [{"role": "user", "content": STORY}], "max_tokens": 40, "temperature": 0, **fields}
    answer = server.post(CHAT, **sent, prediction={"type": "content", "content": text})
    assert answer.status_code == 200, answer.text
    return answer


def chat(server, text, **fields):
    return post(server, text, **fields).json()


def streamed(server, text, **fields):
    lines = post(server, text, stream=True, **fields).text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line and not line.endswith("[DONE]")]


def test_explain_usage_and_metrics_count_the_same_drafts(eager):
    text = chat(eager, "")["choices"][0]["message"]["content"]
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")
    before = [eager.metric(f"vllm:spec_decode_{name}_total") for name in names]
    answer = chat(eager, text, explain=True)
    grown = [eager.metric(f"vllm:spec_decode_{name}_total") - b for name, b in zip(names, before)]
    told, details = answer["explanation"], answer["usage"]["completion_tokens_details"]
    drafted, accepted = told["drafted_tokens"], told["accepted_tokens"]
    assert details == {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
    assert grown[1:] == [drafted, accepted, accepted] and 0 < grown[0] <= drafted
    assert accepted > answer["usage"]["completion_tokens"] / 2
    assert len(told["batch_sizes"]) == answer["usage"]["completion_tokens"] - accepted, "an accepted draft saves a step"
    assert sum(told["gammas"]) == drafted and len(told["gammas"]) == len(told["batch_sizes"])


def check_places(places, tokens, steps):
    """Of a step, at most four drafts stand before the token that it sampled."""
    sampled = sorted({*range(tokens)} - {*places})
    assert len(places) == len({*places}) == tokens - len(sampled) and places == sorted(places)
    assert len(sampled) == steps and max(b - a for a, b in zip([-1, *sampled], sampled)) == 5


@pytest.mark.parametrize("scored", [{}, {"logprobs": True}])
def test_explain_has_the_places_of_accepted_drafts_and_other_answers_none(eager, scored):
    plain = chat(eager, "", **scored)
    text = plain["choices"][0]["message"]["content"]
    sent = {"return_token_ids": True, **scored}
    whole = chat(eager, text, explain=True, **sent)
    [choice], told = whole["choices"], whole["explanation"]
    assert len(choice["accepted_drafts"]) == told["accepted_tokens"] > len(choice["token_ids"]) / 2
    check_places(choice["accepted_drafts"], len(choice["token_ids"]), len(told["batch_sizes"]))
    chunks = streamed(eager, text, explain=True, **sent)
    parts = [choice for chunk in chunks for choice in chunk["choices"] if "accepted_drafts" in choice]
    given = 0
    for part in parts:
        assert all(given <= place for place in part["accepted_drafts"]), "a place comes no later than its token"
        given += len(part["token_ids"])
    assert [place for part in parts for place in part["accepted_drafts"]] == choice["accepted_drafts"]
    assert sum(bool(part["accepted_drafts"]) for part in parts) > 1, "each chunk has its own"
    for bare in (plain, chat(eager, text, **sent), *streamed(eager, text, **sent)):
        assert "accepted_drafts" not in json.dumps(bare)


def test_drafts_behind_a_stop_string_are_not_accepted(eager):
    text = chat(eager, "")["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:3]
    for _ in range(2):
        answer = chat(eager, text, stop=[stop])
        details = answer["usage"]["completion_tokens_details"]
        assert 0 < details["accepted_prediction_tokens"] <= answer["usage"]["completion_tokens"]


def test_a_stream_has_the_counts_in_its_usage(client):
    plain = ask(client, temperature=0)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, text_of(plain), temperature=0, stream=True, stream_options=options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text_of(plain)
    details = [c.usage.completion_tokens_details for c in chunks]
    counts = [d.accepted_prediction_tokens + d.rejected_prediction_tokens for d in details]
    assert counts == sorted(counts) and chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    bare = list(ask(client, temperature=0, stream=True, stream_options=options))
    assert all(c.usage.completion_tokens_details is None for c in bare)


TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("prediction", "hint"),
    [
        ({}, '{"type": "content", "content": text}'),
        ({"content": "a"}, '{"type": "content", "content": text}'),
        ({"type": "text", "content": "a"}, '{"type": "content", "content": text}'),
        ({"type": "content"}, "text, or a list of text parts"),
        ({"type": "content", "content": 5}, "text, or a list of text parts"),
        ({"type": "content", "content": TEXT}, "text, or a list of text parts"),
        ({"type": "content", "content": ["a"]}, 'prediction.content[0] must be a text part: {"type": "text"'),
        ({"type": "content", "content": [TEXT, {"type": "image_url"}]}, "prediction.content[1] must be a text part"),
        ({"type": "content", "content": [{"type": "text"}]}, "prediction.content[0].text must be text"),
        ({"type": "content", "content": [{**TEXT, "more": 1}]}, "prediction.content[0] has no key 'more'"),
        ({"type": "content", "content": "a", "more": 1}, "prediction has no key 'more': it may have type, content"),
        ("a", "prediction"),
        (["a"], "prediction"),
    ],
)
def test_what_is_no_prediction_is_refused_with_its_form(server, prediction, hint):
    refused = server.client.post(CHAT, json={"messages": MESSAGES, "prediction": prediction})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == "prediction" and hint in error["message"], error


def test_nulls_ask_for_nothing(server):
    for prediction in (None, {"type": "content", "content": [{**TEXT, "more": None}], "more": None}):
        sent = {"messages": MESSAGES, "max_tokens": 2, "prediction": prediction}
        assert server.client.post(CHAT, json=sent).status_code == 200


def test_a_beam_search_takes_none(client):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "some text", n=2, extra_body={"use_beam_search": True})
    assert refused.value.param == "prediction" and "beam search" in str(refused.value)
    assert len(ask(client, "", n=2, extra_body={"use_beam_search": True}).choices) == 2


def test_completions_have_none(server):
    refused = server.post("/v1/completions", prompt="a", prediction={"type": "content", "content": "a"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prediction"
