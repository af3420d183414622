"""Errors name the fields that the client sent, with OpenAI's codes; values that ask for nothing are no errors."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from headrace import RequestError, SamplingParams
from headrace.errors import renamed_fields
from headrace.serve.errors import NotFoundError
from headrace.serve.protocol.fields import CHAT, COMPLETIONS, DETOKENIZE, EMBEDDINGS, TOKENIZE
from headrace.serve.protocol.requests import read_generation_request
from headrace.text.chat import ChatTemplate
from headrace.text.variables import template_variables

SOURCE = Path(__file__).resolve().parents[2] / "src" / "headrace"
HI = [{"role": "user", "content": "hi"}]
LONG = "Mia lives at the market. " * 2000
BASE = {COMPLETIONS: {"prompt": "Once", "max_tokens": 3}, CHAT: {"messages": HI, "max_tokens": 3}}
OVERFLOW = "context_length_exceeded"
ENGINE_NAMES = ("prompt", "max_tokens", "logprobs", "beam_width")


def refused(answer, status=400):
    assert answer.status_code == status, answer.text[:300]
    return answer.json()["error"]


@pytest.mark.parametrize(
    ("endpoint", "fields", "param", "code"),
    [
        (COMPLETIONS, {"prompt": ""}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": ["a", "", "b"]}, "prompt[1]", "invalid_value"),
        (COMPLETIONS, {"prompt": [""]}, "prompt[0]", "invalid_value"),
        (COMPLETIONS, {"prompt": ["a", "b", LONG]}, "prompt[2]", OVERFLOW),
        (COMPLETIONS, {"prompt": [[5], [5, 10**6]]}, "prompt[1]", "invalid_value"),
        (COMPLETIONS, {"prompt": [5, 10**6]}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": LONG}, "prompt", OVERFLOW),
        (COMPLETIONS, {"prompt": LONG, "stream": True}, "prompt", OVERFLOW),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 100_000}, "max_tokens", OVERFLOW),
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 100_000}, "max_tokens", OVERFLOW),
        (COMPLETIONS, {"prompt": "a", "min_tokens": 9, "max_tokens": 5}, "min_tokens", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "n": 100, "use_beam_search": True}, "n", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [5, 10**6]}, "stop_token_ids", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "temprature": 1}, "temprature", "unknown_parameter"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        (COMPLETIONS, {}, "prompt", "missing_required_parameter"),
        (CHAT, {"messages": HI, "max_completion_tokens": 100_000}, "max_completion_tokens", OVERFLOW),
        (CHAT, {"messages": HI, "max_completion_tokens": 5, "min_tokens": 9}, "min_tokens", "invalid_value"),
        (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 25}, "top_logprobs", "invalid_value"),
        (CHAT, {"messages": HI, "n": 100, "use_beam_search": True}, "n", "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, "messages", OVERFLOW),
        (CHAT, {"messages": [{"role": "user", "content": LONG}], "stream": True}, "messages", OVERFLOW),
        (CHAT, {"messages": HI, "chat_template": "{{ '' }}"}, "messages", "invalid_value"),
        (EMBEDDINGS, {"input": ""}, "input", "invalid_value"),
        (EMBEDDINGS, {"input": ["a", ""]}, "input[1]", "invalid_value"),
        (EMBEDDINGS, {"input": ["a", LONG]}, "input[1]", OVERFLOW),
        (EMBEDDINGS, {"input": [[5], [10**6]]}, "input[1]", "invalid_value"),
        (EMBEDDINGS, {"input": ["a"] * 3000}, "input", "invalid_value"),
        (EMBEDDINGS, {"input": [10**6]}, "input", "invalid_value"),
        (TOKENIZE, {"prompt": 5}, "prompt", "invalid_value"),
        (TOKENIZE, {"messages": [{"role": "user", "content": 5}]}, "messages", "invalid_value"),
        (DETOKENIZE, {"tokens": [5, 10**6]}, "tokens", "invalid_value"),
    ],
)
def test_an_error_names_what_the_client_sent(server, endpoint, fields, param, code):
    answer = server.client.post(endpoint, json=fields)
    error = refused(answer)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error"), error
    words = re.findall(r"[\w.]+(?:\[\d+\])?", error["message"])
    assert re.search(rf"(?<!\w){re.escape(param)}", error["message"]), error
    for name in ENGINE_NAMES:
        assert name not in words or name in fields or name == "prompt", error
    assert "prompt" not in words or endpoint in (COMPLETIONS, TOKENIZE), error
    if code == OVERFLOW:
        assert error["message"].startswith("This model's maximum context length is 512 tokens"), error
        assert len(error["message"]) < 300


def test_codes_are_openais_strings(server):
    for answer, status, code in (
        (server.post(COMPLETIONS, prompt="a", model="another"), 404, "model_not_found"),
        (server.client.get("/v1/models/another"), 404, "model_not_found"),
        (server.client.get("/v1/nothing"), 404, "unknown_url"),
        (server.client.get(COMPLETIONS), 405, "method_not_supported"),
        (server.client.post(COMPLETIONS, content=b"{"), 400, None),
        (server.post("/update_weights", path="x"), 403, None),
    ):
        assert refused(answer, status)["code"] == code


def test_an_in_process_error_names_the_prompt_and_its_index(llm):
    params = SamplingParams(max_tokens=3)
    for prompts, param in (("", "prompt"), (["a", ""], "prompts[1]"), (["a", LONG], "prompts[1]"), (LONG, "prompt")):
        with pytest.raises(RequestError) as caught:
            llm.generate(prompts, params)
        assert caught.value.param == param and param in str(caught.value)
        if prompts in (LONG, ["a", LONG]):
            assert caught.value.code == OVERFLOW
            assert str(caught.value).startswith("This model's maximum context length is 512 tokens")
    with pytest.raises(RequestError, match="maximum context length is 512 tokens") as caught:
        llm.generate("a", SamplingParams(max_tokens=600))
    assert (caught.value.param, caught.value.code) == ("max_tokens", OVERFLOW)
    with pytest.raises(RequestError, match="2 params for 1 prompts") as caught:
        llm.generate("a", [params, params])
    assert caught.value.param == "params"


def test_every_sampling_parameter_s_error_names_it():
    wrong: tuple[tuple[str, Any], ...] = (
        ("n", 0),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("beam_width", 65),
        ("length_penalty", float("nan")),
        ("temperature", "1"),
        ("top_k", -2),
        ("top_p", 1.1),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("seed", 1.5),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {5: 101.0}),
        ("stop_token_ids", (5, -1)),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (5, -1)),
        ("stop", ("a", "")),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
    )
    for name, value in wrong:
        with pytest.raises(RequestError, match=rf"^{name}\b") as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name
        other = caught.value.renamed({name: "field[3]"})
        assert other.param == "field[3]" and str(other) == "field[3]" + str(caught.value).removeprefix(name)


def test_renaming_keeps_values_codes_and_classes():
    error = RequestError.about("prompt", "{prompt} is {}, not {max_tokens}", "{prompt} {} {", code="c")
    assert str(error) == "prompt is {prompt} {} {, not max_tokens"
    again = error.renamed({"prompt": "a"}).renamed({"prompt": "input[1]", "max_tokens": "b"})
    assert (str(again), again.param, again.code) == ("input[1] is {prompt} {} {, not b", "a", "c")
    with pytest.raises(NotFoundError, match=r"no \{model\}") as caught, renamed_fields({"model": "name"}):
        raise NotFoundError("no {model}", "model", "model_not_found")
    assert (caught.value.param, caught.value.code) == ("name", "model_not_found")


WITHOUT_A_FIELD = {
    "serve/protocol/bodies.py": 3,  # a body that is no JSON object
    "serve/gateway.py": 1,  # what msgpack cannot hold, wherever it was
    "serve/routes/weights.py": 1,  # a flag that is missing
    "llm/frontend.py": 2,  # a resume record, which is no request's field
    "llm/records.py": 2,
    "engine/schedule/mask.py": 1,
}
ERRORS = ("RequestError", "RefusedError", "NotFoundError", "NotAllowedError")


@pytest.mark.parametrize("room", ["text", "engine", "grammar", "dialects", "llm", "instance", "serve"])
def test_errors_of_requests_are_raised_with_their_field(room):
    for path in sorted((SOURCE / room).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        bare = [
            call.lineno
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id in ERRORS and len(call.args) < 2 and not call.keywords
        ]
        name = str(path.relative_to(SOURCE))
        assert len(bare) <= WITHOUT_A_FIELD.get(name, 0), f"{name} raises errors without a field in lines {bare}"


# ---- values that ask for nothing


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (CHAT, {"logprobs": False, "top_logprobs": 0}),
        (CHAT, {"top_logprobs": 0}),
        (CHAT, {"logprobs": None, "top_logprobs": None}),
        (CHAT, {"best_of": 1}),
        (CHAT, {"best_of": 2, "n": 2}),
        (COMPLETIONS, {"best_of": 2, "n": 2}),
        (COMPLETIONS, {"response_format": {"type": "text"}}),
        *((on, {"stream_options": None}) for on in BASE),
        *((on, {"stream_options": {}}) for on in BASE),
        *((on, {"stream_options": {"include_usage": False}}) for on in BASE),
        *((on, {"stream_options": {"include_usage": False, "continuous_usage_stats": False}}) for on in BASE),
        *((on, {"stream_options": {"include_usage": False}, "stream": True}) for on in BASE),
        *(
            (on, {"stream_options": {"include_usage": None, "continuous_usage_stats": None}, "stream": True})
            for on in BASE
        ),
        *((on, {"stream_options": {"include_obfuscation": False}, "stream": True}) for on in BASE),
        *((on, {"length_penalty": 1, "use_beam_search": False}) for on in BASE),
        *((on, {"priority": 0, "min_tokens": 0, "top_k": -1, "min_p": 0, "repetition_penalty": 1}) for on in BASE),
        *((on, {"stop": [], "stop_token_ids": [], "logit_bias": {}, "echo": False}) for on in BASE),
        *((on, {"seed": -1}) for on in BASE),
        *((on, {"truncation_side": "left"}) for on in BASE),
        *((on, {"seed": -5}) for on in BASE),
        *((on, {"top_p": 0}) for on in BASE),
        (CHAT, {"chat_template_kwargs": {}}),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}),
        (CHAT, {"chat_template_kwargs": {"thinking": False, "enable_thinking": False}}),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": None, "mood": None}}),
        (CHAT, {"reasoning_effort": "none"}),
        (CHAT, {"tools": [], "tool_choice": "none", "parallel_tool_calls": True}),
    ],
)
def test_what_asks_for_nothing_passes(server, endpoint, fields):
    answer = server.client.post(endpoint, json={**BASE[endpoint], **fields})
    assert answer.status_code == 200, answer.text
    assert not fields.get("stream") or '"usage":{' not in answer.text


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        (CHAT, {"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"best_of": 2}, "best_of"),
        (CHAT, {"best_of": True}, "best_of"),
        (COMPLETIONS, {"best_of": 3, "n": 2}, "best_of"),
        (COMPLETIONS, {"stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        (COMPLETIONS, {"stream_options": {"continuous_usage_stats": None}}, "stream_options"),
        (CHAT, {"stream_options": {"include_usage": None}, "stream": False}, "stream_options"),
        (COMPLETIONS, {"seed": 2**63}, "seed"),
        (CHAT, {"truncation_side": "right"}, "truncation_side"),
        (COMPLETIONS, {"truncation_side": "both", "truncate_prompt_tokens": 1}, "truncation_side"),
        (COMPLETIONS, {"truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
        (COMPLETIONS, {"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options"),
        (COMPLETIONS, {"stream_options": {"other": False}, "stream": True}, "stream_options"),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        (CHAT, {"chat_template_kwargs": {"mood": False}}, "chat_template_kwargs"),
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (COMPLETIONS, {"seed": -(2**63) - 1}, "seed"),
        (COMPLETIONS, {"top_p": -0.1}, "top_p"),
        (COMPLETIONS, {"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
        (CHAT, {"return_hidden_states": True}, "return_hidden_states"),
    ],
)
def test_what_asks_for_something_that_is_not_there_is_refused(server, endpoint, fields, param):
    error = refused(server.client.post(endpoint, json={**BASE[endpoint], **fields}))
    assert error["param"] == param and param in error["message"]


def test_no_thinking_is_passed_by_the_name_that_the_template_has():
    def given(source, **variables):
        return template_variables(ChatTemplate(source), {name: ("f", value) for name, value in variables.items()})

    qwen, deepseek, plain = "{{ enable_thinking }}", "{{ thinking }}", "{{ messages }}"
    assert given(qwen, reasoning_effort="none") == given(qwen, thinking=False) == {"enable_thinking": False}
    assert given(deepseek, enable_thinking=False) == {"thinking": False}
    assert given("{{ reasoning_effort }}", reasoning_effort="none") == {"reasoning_effort": "none"}
    assert given(qwen, reasoning_effort="none", enable_thinking=True) == {"enable_thinking": True}
    assert given(plain, reasoning_effort="none", enable_thinking=False, thinking=None) == {}
    for variables in ({"thinking": True}, {"reasoning_effort": "low"}, {"mood": False}):
        with pytest.raises(RequestError, match="does not use") as caught:
            given(plain, **variables)
        assert caught.value.param == "f"


def test_seed_minus_one_draws_another_text_each_time(server, llm):
    def texts(endpoint, **fields):
        body = {**BASE[endpoint], "max_tokens": 24, "temperature": 1.5, "ignore_eos": True, **fields}
        answers = [server.client.post(endpoint, json={**body, "return_token_ids": True}).json() for _ in range(3)]
        return {tuple(answer["choices"][0]["token_ids"]) for answer in answers}

    for endpoint in BASE:
        assert len(texts(endpoint, seed=-1)) == 3
        assert len(texts(endpoint, seed=-2)) == len(texts(endpoint, seed=7)) == 1
    params = SamplingParams(seed=-1, temperature=1.5, max_tokens=24, ignore_eos=True)
    assert params.seed is None
    assert len({tuple(output.outputs[0].token_ids) for output in llm.generate(["Once"] * 3, params)}) == 3


def test_top_p_zero_is_the_best_token():
    params = read_generation_request({"top_p": 0, "temperature": 1.5}, COMPLETIONS, {}, False).params
    assert (params.top_k, params.top_p, params.temperature) == (1, 1.0, 1.5)


def test_a_body_may_begin_with_a_byte_order_mark(server):
    body = json.dumps({**BASE[COMPLETIONS], "temperature": 0}).encode()
    marked = server.client.post(COMPLETIONS, content=b"\xef\xbb\xbf" + body)
    assert marked.status_code == 200
    assert marked.json()["choices"] == server.client.post(COMPLETIONS, content=body).json()["choices"]
    assert server.client.post(COMPLETIONS, content=b"\xef\xbb\xbf" * 2 + body).status_code == 400
    for endpoint, fields in ((TOKENIZE, {"prompt": "a"}), (EMBEDDINGS, {"input": "a"}), (DETOKENIZE, {"tokens": [5]})):
        assert server.client.post(endpoint, content=b"\xef\xbb\xbf" + json.dumps(fields).encode()).status_code == 200


@pytest.mark.parametrize("endpoint", BASE)
def test_usage_that_is_not_wanted_is_in_no_chunk(server, endpoint):
    options = {"include_usage": False, "continuous_usage_stats": True}
    answer = server.client.post(endpoint, json={**BASE[endpoint], "stream": True, "stream_options": options})
    assert answer.status_code == 200 and '"usage":{' not in answer.text


# ---- what other servers' clients look for in a message


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (COMPLETIONS, {"prompt": [5, 100_000]}),
        (EMBEDDINGS, {"input": [[5], [100_000]]}),
        (DETOKENIZE, {"tokens": [5, 100_000]}),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"100000": 1}}),
        (CHAT, {"messages": HI, "stop_token_ids": [100_000]}),
        (CHAT, {"messages": HI, "allowed_token_ids": [100_000]}),
    ],
)
def test_a_token_id_that_does_not_exist_is_named_with_the_vocabularys_size(server, llm, endpoint, fields):
    message = refused(server.post(endpoint, **fields))["message"]
    assert "100000" in message and "out of vocabulary" in message and str(llm.tokenizer.vocab_size) in message


def test_a_model_that_does_not_exist_is_named_as_such(server):
    for answer in (server.post(COMPLETIONS, prompt="a", model="other"), server.client.get("/v1/models/other")):
        error = refused(answer, 404)
        assert "'other' does not exist" in error["message"] and "'tiny'" in error["message"]


def test_every_key_of_logit_bias_that_is_no_id_is_named(server):
    message = refused(server.post(COMPLETIONS, prompt="a", logit_bias={"bad1": 50, "7": 1, "bad2": 20}))["message"]
    assert "'bad1'" in message and "'bad2'" in message and "'7'" not in message
    many = {f"bad{i}" + "x" * 100: 1 for i in range(1000)}
    assert len(refused(server.post(COMPLETIONS, prompt="a", logit_bias=many))["message"]) < 800


@pytest.mark.parametrize(("side", "kept"), [("left", [8, 9, 10, 11]), ("right", [5, 6, 7, 8]), (None, [8, 9, 10, 11])])
def test_a_prompt_is_cut_at_either_end(server, side, kept):
    fields = {"truncate_prompt_tokens": 4, "truncation_side": side, "max_tokens": 1, "return_token_ids": True}
    ids = server.post(COMPLETIONS, prompt=list(range(5, 12)), **fields).json()["choices"][0]["prompt_token_ids"]
    assert ids == kept
    vector, expected = (
        server.post(EMBEDDINGS, input=ids, **more).json()["data"][0]["embedding"]
        for ids, more in ((list(range(5, 12)), {"truncate_prompt_tokens": 4, "truncation_side": side}), (kept, {}))
    )
    assert vector == expected


def test_a_prompt_cannot_be_cut_to_more_than_the_context(server):
    for endpoint, fields in ((EMBEDDINGS, {"input": "a"}), (CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a"})):
        error = refused(server.post(endpoint, **fields, truncate_prompt_tokens=513))
        assert error["param"] == "truncate_prompt_tokens" and "513" in error["message"] and "512" in error["message"]
