"""Every field that clients send is honoured or refused by name, checked on a real server."""

from pathlib import Path
from typing import Any

import pytest

from headrace.cache.key import CacheKey
from headrace.serve.protocol.fields import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    TABLE,
    TOKENIZE,
    UPDATE,
    fields_of,
    markdown,
)
from headrace.serve.protocol.requests import read_generation_request

# What OpenAI's, vLLM's and SGLang's clients send, by the names that they use.
OPENAI_CHAT = """messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
    presence_penalty response_format seed stop stream stream_options temperature top_p tools tool_choice
    parallel_tool_calls reasoning_effort user"""
EXTRAS = """top_k min_p repetition_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
    skip_special_tokens truncate_prompt_tokens prompt_logprobs allowed_token_ids bad_words echo add_special_tokens
    structured_outputs priority request_id session_id return_token_ids cache_salt kv_transfer_params use_beam_search
    length_penalty"""
CHAT_EXTRAS = "add_generation_prompt continue_final_message chat_template chat_template_kwargs"
COMPLETION_EXTRAS = "prompt echo logprobs best_of suffix"

BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Once upon", "max_tokens": 3, "temperature": 0},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0},
    EMBEDDINGS: {"input": "Mia lives at the market"},
    TOKENIZE: {"prompt": "Mia"},
    DETOKENIZE: {"tokens": [5, 6]},
}
TEMPLATE = "{{ messages[0].content }}{{ reasoning_effort }}{{ mood }}"
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
JSON_OBJECT = {"type": "json_object"}
CALLS = "{{ messages[0].content }}{{ tools }}{# <tool_call> arguments #}"
# A value that a server honours, with the fields that it needs.
VALUES: dict[str | tuple[str, str], Any] = {
    "model": "tiny",
    "prompt": [5, 6, 7],
    "n": 2,
    "max_tokens": 2,
    "max_completion_tokens": 3,
    "min_tokens": 2,
    "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    "input": ["a", "b"],
    "stream": True,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 50},
    "allowed_token_ids": [5, 6],
    "stop": ["the"],
    "stop_token_ids": [9],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "add_special_tokens": False,
    "truncate_prompt_tokens": 1,
    "truncation_side": ("right", {"truncate_prompt_tokens": 1}),
    "add_generation_prompt": False,
    "chat_template": "{{ messages[0].content }}!",
    "skip_special_tokens": False,
    "return_token_ids": True,
    "explain": True,
    "encoding_format": "base64",
    "normalize": False,
    "use_activation": False,
    ("return_tokens_as_token_ids", COMPLETIONS): (True, {"logprobs": 1}),
    ("return_tokens_as_token_ids", CHAT): (True, {"logprobs": True}),
    "return_token_strs": True,
    "tokens": [7],
    "request_id": "mine",
    "cache_salt": "pepper",
    "prompt_logprobs": 1,
    "echo": True,
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "use_beam_search": (True, {"n": 2}),
    "length_penalty": (0.5, {"use_beam_search": True, "n": 2}),
    "top_logprobs": (2, {"logprobs": True}),
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["red", "green"]},
    "bad_words": ["ugly", "bad"],
    "jump_forward": False,
    ("tools", CHAT): (TOOLS, {"chat_template": CALLS}),
    ("tools", TOKENIZE): (TOOLS, {"prompt": None, "messages": BASE[CHAT]["messages"], "chat_template": CALLS}),
    "tool_choice": ("required", {"tools": TOOLS, "chat_template": CALLS}),
    "parallel_tool_calls": (False, {"tools": TOOLS, "chat_template": CALLS}),
    "include_reasoning": False,
    "prediction": {"type": "content", "content": "Mia lives at the market"},
    "reasoning_effort": ("low", {"chat_template": TEMPLATE}),
    "chat_template_kwargs": ({"mood": "good"}, {"chat_template": TEMPLATE}),
    "continue_final_message": (
        True,
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ),
    ("echo", CHAT): (True, {"continue_final_message": True, "messages": [{"role": "assistant", "content": "b"}]}),
    ("logprobs", CHAT): True,
    ("logprobs", COMPLETIONS): 2,
    ("messages", TOKENIZE): ([{"role": "user", "content": "hi"}], {"prompt": None}),
    ("prompt", TOKENIZE): "some text",
    ("chat_template", TOKENIZE): ("{{ messages[0].content }}!", {"prompt": None, "messages": BASE[CHAT]["messages"]}),
    ("chat_template_kwargs", TOKENIZE): (
        {"mood": "good"},
        {"prompt": None, "messages": BASE[CHAT]["messages"], "chat_template": TEMPLATE},
    ),
    ("add_generation_prompt", TOKENIZE): (False, {"prompt": None, "messages": BASE[CHAT]["messages"]}),
    ("continue_final_message", TOKENIZE): (True, {"prompt": None, "messages": [{"role": "assistant", "content": "b"}]}),
}
NEEDS_ITS_OWN_SERVER = {"priority"}
# Whether three tokens show it depends on the model. That they reach the engine is tested below.
SHOWN_ELSEWHERE = {f.name for f in TABLE if f.sampling} - {"prompt_logprobs"} | {
    "n",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "cache_salt",
    "add_special_tokens",
    "add_generation_prompt",
    "parallel_tool_calls",
    "include_reasoning",
}
# Wrong for every honoured field of any type.
WRONG = {"not": ["what", {"is": "expected"}]}


def rows(handling):
    return [
        pytest.param(f, on, id=f"{on}:{f.name}") for f in TABLE for on in f.on if f.handling == handling and on in BASE
    ]


def test_every_known_field_has_a_row():
    chat, completions = set(fields_of(CHAT)), set(fields_of(COMPLETIONS))
    assert set(OPENAI_CHAT.split()) | set(EXTRAS.split()) | set(CHAT_EXTRAS.split()) <= chat
    assert set(COMPLETION_EXTRAS.split()) | set(EXTRAS.split()) <= completions
    assert {on for f in TABLE for on in f.on} - set(BASE) == {UPDATE}, "its fields have tests of their own"
    for endpoint in BASE:
        names = [f.name for f in TABLE if endpoint in f.on]
        assert len(names) == len(set(names)), "a field has two rows"


@pytest.mark.parametrize(("field", "endpoint"), rows("honoured"))
def test_an_honoured_field_changes_the_answer_or_is_refused_where_it_cannot(server, field, endpoint):
    if field.name in NEEDS_ITS_OWN_SERVER:
        refused = server.post(endpoint, **BASE[endpoint], **{field.name: 1})
        assert refused.status_code == 400 and "--scheduling-policy priority" in refused.json()["error"]["message"]
        return
    value = VALUES.get((field.name, endpoint), VALUES.get(field.name))
    value, others = value if isinstance(value, tuple) else (value, {})
    sent = {**BASE[endpoint], **others, field.name: value}
    answer = server.client.post(endpoint, json=sent)
    assert answer.status_code == 200, answer.text
    if field.name == "model":
        return
    without = {name: v for name, v in sent.items() if name != field.name}
    if not field.required:
        plain = server.client.post(endpoint, json=without)
        if field.name in SHOWN_ELSEWHERE:
            return
        assert plain.status_code != 200 or told(plain) != told(answer)
    bad = 3 if field.name == "chat_template_kwargs" else WRONG
    wrong = server.client.post(endpoint, json={**sent, field.name: bad})
    assert wrong.status_code == 400 and field.name in wrong.json()["error"]["message"]
    assert wrong.json()["error"]["param"] == field.name


@pytest.mark.parametrize("field", [f for f in TABLE if f.sampling], ids=lambda f: f.name)
def test_a_sampling_field_reaches_the_engine(field):
    value = VALUES[field.name]
    value, others = value if isinstance(value, tuple) else (value, {})
    generation = read_generation_request({**others, field.name: value}, COMPLETIONS, {}, False)
    assert getattr(generation.params, field.sampling) == (tuple(value) if isinstance(value, list) else value)


def test_fields_that_are_read_together_reach_the_engine():
    body = {
        "n": 2,
        "use_beam_search": True,
        "stop": "x",
        "logit_bias": {"5": 1},
        "max_tokens": 7,
        "cache_salt": "s",
        "priority": 3,
        "logprobs": 2,
        "echo": True,
        "prompt_logprobs": 4,
    }
    generation = read_generation_request(body, COMPLETIONS, {"temperature": 0.5, "top_k": 9}, True)
    params = generation.params
    assert (params.n, params.beam_width, params.stop, params.logit_bias, params.max_tokens) == (2, 2, ("x",), {5: 1}, 7)
    assert (generation.cache_key, generation.priority, params.logprobs, params.prompt_logprobs) == (
        CacheKey(salt="s"),
        3,
        2,
        4,
    )
    assert (params.temperature, params.top_k) == (0.5, 9)
    assert read_generation_request({"temperature": 0.1}, CHAT, {"temperature": 0.5}, False).params.temperature == 0.1
    assert read_generation_request({}, CHAT, {}, False).params.max_tokens is None
    assert read_generation_request({}, COMPLETIONS, {}, False).params.max_tokens == 16


def told(answer):
    """An answer without what differs every time, unless the request chose it."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        return [line.count('"usage"') for line in answer.text.splitlines()]
    body = answer.json()
    body.pop("created", None)
    if not str(body.get("id")).endswith("-mine"):
        body.pop("id", None)
    if "explanation" in body:
        body["explanation"] = True
    body.get("usage", {}).pop("prompt_tokens_details", None)
    return body


@pytest.mark.parametrize(("field", "endpoint"), rows("refused"))
def test_a_refused_field_is_named_and_asking_for_nothing_is_not_refused(server, field, endpoint):
    refused = server.client.post(endpoint, json={**BASE[endpoint], field.name: WRONG})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == field.name and field.name in error["message"]
    assert error["type"] == "invalid_request_error" and field.description in error["message"]
    for neutral in (None, *field.neutral):
        assert server.client.post(endpoint, json={**BASE[endpoint], field.name: neutral}).status_code == 200


@pytest.mark.parametrize(("field", "endpoint"), rows("ignored"))
def test_openais_book_keeping_is_ignored(server, field, endpoint):
    assert server.client.post(endpoint, json={**BASE[endpoint], field.name: "anything"}).status_code == 200


@pytest.mark.parametrize("endpoint", BASE)
def test_a_field_that_is_not_in_the_table_is_refused_with_a_guess(server, endpoint):
    refused = server.client.post(endpoint, json={**BASE[endpoint], "temprature": 1})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == "temprature"
    if endpoint in (COMPLETIONS, CHAT):
        assert error["message"].endswith("did you mean temperature?")


@pytest.mark.parametrize("endpoint", BASE)
def test_a_required_field_must_be_there(server, endpoint):
    for name in BASE[endpoint]:
        if fields_of(endpoint)[name].required:
            fields = {n: v for n, v in BASE[endpoint].items() if n != name}
            for sent in (fields, {**fields, name: None}):
                refused = server.client.post(endpoint, json=sent)
                assert refused.status_code == 400 and refused.json()["error"]["param"] == name


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"stream": True, "stream_options": {"include_usages": True}}, "stream_options"),
        (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        (COMPLETIONS, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"length_penalty": 0.5}, "length_penalty"),
        (COMPLETIONS, {"logit_bias": {"x": 1}}, "logit_bias"),
        (COMPLETIONS, {"logit_bias": {"999999": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": [999999]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 3, "explain": True}, "explain"),
        (COMPLETIONS, {"prompt": ["a"] * 3000}, "prompt"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"n": 2, "best_of": 3}, "best_of"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
        (COMPLETIONS, {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
        (CHAT, {"max_completion_tokens": 4}, "max_tokens"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages"),
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (CHAT, {"response_format": JSON_OBJECT, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (CHAT, {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        (CHAT, {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs"),
        (CHAT, {"response_format": {"type": "structural_tag"}}, "response_format"),
        (COMPLETIONS, {"response_format": {"type": "json_object"}, "use_beam_search": True}, "response_format"),
        (COMPLETIONS, {"bad_words": ["a"], "use_beam_search": True}, "bad_words"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (
            CHAT,
            {"tools": TOOLS, "tool_choice": "required", "chat_template": CALLS, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        (CHAT, {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        (CHAT, {"tools": TOOLS * 2}, "tools"),
        (TOKENIZE, {"messages": [{"role": "user", "content": "a"}]}, "prompt"),
        (DETOKENIZE, {"tokens": [10**6]}, "tokens"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(server, endpoint, fields, param):
    refused = server.client.post(endpoint, json={**BASE[endpoint], **fields})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text


def test_the_documentation_has_this_table():
    document = Path(__file__).resolve().parents[2] / "docs" / "server.md"
    assert document.read_text().endswith(markdown())
