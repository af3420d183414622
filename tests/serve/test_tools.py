"""Tools and reasoning with the real `openai` client: every choice of tools, every format, whole and streamed."""

import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from headrace import SamplingParams
from headrace.serve.protocol.fields import CHAT, TOKENIZE
from serve.http_kit import served, until

MESSAGES: list[Any] = [{"role": "user", "content": "Where is Mia right now?"}]
FIND: dict[str, Any] = {
    "type": "object",
    "properties": {"who": {"enum": ["Mia", 'Tom "{"']}, "n": {"type": "integer", "minimum": 1, "maximum": 31}},
    "required": ["who"],
    "additionalProperties": False,
}
LIST: dict[str, Any] = {"type": "object", "properties": {"of": {"items": {"enum": ["cup", "key"]}, "maxItems": 2}}}
LIST |= {"required": ["of"], "additionalProperties": False}
LIST["properties"]["of"]["type"] = "array"
EMPTY: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"find": FIND, "list_things": LIST, "ping": EMPTY}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "find", "description": "a person", "parameters": FIND}},
    {"type": "function", "function": {"name": "list_things", "parameters": LIST, "strict": True}},
    {"type": "function", "function": {"name": "ping"}},
]
PLACE: dict[str, Any] = {"type": "object", "properties": {"at": {"enum": ["mill", "well"]}}, "required": ["at"]}
PLACE |= {"additionalProperties": False}
FORM: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
VALID = {name: jsonschema_rs.validator_for(schema) for name, schema in SCHEMAS.items()}

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
"""A template that knows no tools."""
MARKERS = {
    "hermes": "{# <tool_call> arguments #}",
    "llama3": """{# <|start_header_id|> {"name": "parameters": #}""",
    "mistral": "{# [TOOL_CALLS] #}",
}
"""What tells a template's format of calls."""
EMPTY_LIST = re.compile(r'"tool_calls": ?\[\]')


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


class Choice:
    """A choice as a client gathers it, from an answer or from chunks."""

    def __init__(self) -> None:
        self.content, self.reasoning = "", ""
        self.calls: list[list[str]] = []
        """Id, name and arguments of each."""
        self.logprobs: list[Any] = []
        self.finish: str | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return repr(vars(self))

    @property
    def named(self) -> list[tuple[str, str]]:
        """Name and arguments of each call."""
        return [(name, arguments) for _, name, arguments in self.calls]


def gathered(answer: Any) -> list[Choice]:
    """The choices of an answer."""
    found = []
    for choice in answer.choices:
        told, message = Choice(), choice.message
        told.content, told.reasoning = message.content or "", message.reasoning or ""
        assert message.reasoning == message.reasoning_content and message.tool_calls != []
        assert (message.content is None) == (bool(message.tool_calls) and not told.content)
        told.calls = [[call.id, call.function.name, call.function.arguments] for call in message.tool_calls or ()]
        assert all(call.type == "function" for call in message.tool_calls or ())
        told.logprobs = list(choice.logprobs.content) if choice.logprobs else []
        told.finish = choice.finish_reason
        found.append(told)
    return found


def joined(chunks: Any, n: int = 1) -> list[Choice]:
    """The choices that chunks make up. A call's first chunk has its id, type and name, and no other one has."""
    found = [Choice() for _ in range(n)]
    roles = 0
    for chunk in chunks:
        for choice in chunk.choices:
            told, delta = found[choice.index], choice.delta
            assert told.finish is None, "a chunk after the end"
            roles += delta.role == "assistant"
            told.content += delta.content or ""
            told.reasoning += getattr(delta, "reasoning", None) or ""
            assert getattr(delta, "reasoning", None) == getattr(delta, "reasoning_content", None)
            assert delta.tool_calls != []
            for call in delta.tool_calls or ():
                if call.index == len(told.calls):
                    assert call.id and call.type == "function" and call.function.name
                    told.calls.append([call.id, call.function.name, ""])
                else:
                    assert call.index == len(told.calls) - 1, "an earlier call goes on"
                    assert call.id is call.type is call.function.name is None
                told.calls[-1][2] += call.function.arguments
            told.logprobs += choice.logprobs.content if choice.logprobs else []
            told.finish = choice.finish_reason
    assert roles == n and all(told.finish for told in found)
    return found


def asked(client: openai.OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> list[Choice]:
    """The choices of an answer, which a stream's chunks make up too. Ids are those of the request."""
    given = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "seed": 1, **fields}
    body = {"request_id": "mine", **(extra or {})}
    whole = gathered(client.chat.completions.create(**given, extra_body=body))
    streamed = joined(client.chat.completions.create(**given, extra_body=body, stream=True), given.get("n", 1))
    assert streamed == whole
    return whole


def check_calls(choice: Choice, least: int = 1) -> None:
    """A choice that ends by itself has valid calls, with ids of their own."""
    assert len(choice.calls) >= least
    for name, arguments in choice.named:
        assert VALID[name].is_valid(json.loads(arguments)), (name, arguments)
    ids = [call[0] for call in choice.calls]
    assert len(set(ids)) == len(ids)


# ---- every choice of tools -------------------------------------------------------------------------------------


def test_a_required_call_is_valid(client):
    seen = set()
    for seed in range(4):
        for choice in asked(client, tools=TOOLS, tool_choice="required", n=2, seed=seed, temperature=20):
            seen |= {name for name, _ in choice.named}
            if choice.finish != "length":
                assert choice.finish == "tool_calls" and choice.content == ""
                check_calls(choice)
    assert seen <= set(SCHEMAS) and len(seen) > 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_tool_is_called_once(client, name):
    for choice in asked(client, tools=TOOLS, tool_choice=named(name), n=2):
        assert choice.finish == "stop" and choice.content == ""
        check_calls(choice)
        assert [called for called, _ in choice.named] == [name]
        assert choice.named[0][1] == "{}" or name != "ping"


def test_one_call_at_most(client):
    several = 0
    for seed in range(3):
        fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "n": 3, "seed": seed, "max_tokens": 150}
        several += any(len(choice.calls) > 1 for choice in asked(client, **fields))
        for choice in asked(client, **fields, parallel_tool_calls=False):
            assert len(choice.calls) == 1 and choice.finish == "tool_calls"
            check_calls(choice)
    assert several


@pytest.mark.parametrize("tool_choice", [None, "auto"])
def test_a_model_that_chooses_text_gives_text(client, tool_choice):
    fields = {"tools": TOOLS} if tool_choice is None else {"tools": TOOLS, "tool_choice": tool_choice}
    [choice] = asked(client, **fields, stop=["."], max_tokens=8, temperature=0)
    assert choice.content and not choice.calls and choice.finish in ("stop", "length")


def test_no_tool_may_be_called(client):
    """The text of a call is text."""
    begun = [*MESSAGES, {"role": "assistant", "content": '<tool_call>\n{"name": "ping", "arguments": {'}]
    going = {"continue_final_message": True, "echo": True}
    [choice] = asked(client, going, messages=begun, tools=TOOLS, tool_choice="none", max_tokens=8)
    assert choice.content.startswith('<tool_call>\n{"name": "ping", "arguments": {') and not choice.calls
    [plain] = asked(client, going, messages=begun, max_tokens=8)
    assert plain.content.startswith("<tool_call>") and not plain.calls


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    "start",
    [
        "<tool_",
        "<tool_call>\n",
        '<tool_call>\n{"name": "find", "arg',
        '<tool_call>\n{"name": "find", "arguments": {"who": "To',
        '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "list_things", "arg',
        '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "find", "arguments": {"wh',
    ],
)
def test_a_call_that_a_message_begins_is_given_whole(client, start, echo):
    """A message that goes on, with the text of it before or without; its calls are those of the whole message."""
    begun = [*MESSAGES, {"role": "assistant", "content": "Let me see.\n" + start}]
    extra = {"continue_final_message": True, "echo": echo, "logit_bias": {}}
    for choice in asked(client, extra, messages=begun, tools=TOOLS, tool_choice="auto", n=2, max_tokens=100):
        if start == "<tool_" and not choice.calls:
            continue  # it may still become another text
        assert choice.content == ("Let me see." if echo else "")
        assert choice.calls and choice.named[0][0] in SCHEMAS
        if choice.finish != "length":
            assert choice.finish == "tool_calls"
            check_calls(choice, least=start.count("<tool_call>"))


def test_a_cut_call_keeps_what_it_has(client):
    fields = {"tools": TOOLS, "tool_choice": named("find")}
    [full] = asked(client, **fields)
    [(name, arguments)] = full.named
    lengths = set()
    for most in range(1, 40, 3):
        [cut] = asked(client, **fields, max_tokens=most)
        assert "<tool_call>".startswith(cut.content.strip()) and cut.finish in ("length", "stop")
        for other, part in cut.named:
            assert other == name and arguments.startswith(part)
            lengths.add(len(part))
        assert cut.finish == "length" or cut.named == full.named
    assert len(lengths) > 2


def test_a_stop_string_that_cuts_a_call_leaves_nothing_to_call(client):
    who = {"type": "object", "properties": {"who": {"enum": ["Mia", "Finn"]}}, "required": ["who"]}
    find = {"name": "find", "parameters": who | {"additionalProperties": False}}
    fields: dict[str, Any] = {"tools": [{"type": "function", "function": find}], "tool_choice": "required"}
    [choice] = asked(client, **fields, stop=["Mi", "Fi"])
    assert choice.named == [("find", '{"who": "')] and choice.finish == "stop"
    [choice] = asked(client, **fields, stop=["</tool_call>"])
    assert choice.named[0][1] in ('{"who": "Mia"}', '{"who": "Finn"}') and choice.finish == "tool_calls"
    [choice] = asked(client, **fields, stop=["name"])
    assert not choice.calls and not choice.content and choice.finish == "stop"


def test_log_probabilities_and_usage_survive_calls(client, server):
    fields: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": named("find")}
    fields |= {"seed": 5, "max_tokens": 120, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**fields)
    [choice] = gathered(answer)
    assert len(choice.logprobs) == answer.usage.completion_tokens > 0
    text = "".join(entry.token for entry in choice.logprobs)
    assert text.startswith("<tool_call>") and choice.named[0][1] in text
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks)[0].logprobs == choice.logprobs
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    counted = server.post(TOKENIZE, messages=MESSAGES, tools=TOOLS).json()
    assert counted["count"] == answer.usage.prompt_tokens > server.post(TOKENIZE, messages=MESSAGES).json()["count"]
    asked_ids = server.post(CHAT, messages=MESSAGES, tools=TOOLS, max_tokens=1, return_token_ids=True).json()
    assert asked_ids["prompt_token_ids"] == counted["tokens"]


def test_calls_are_those_of_the_engine(client, llm):
    for seed in range(3):
        params = SamplingParams(seed=seed, n=2, max_tokens=120)
        output = llm.chat(MESSAGES, params, tools=TOOLS, tool_choice="required")
        expected = [
            (message.content, [(call.name, call.arguments) for call in message.tool_calls])
            for message in output.messages
        ]
        choices = asked(client, tools=TOOLS, tool_choice="required", n=2, seed=seed)
        assert [(choice.content, choice.named) for choice in choices] == expected


def test_calls_are_counted(client, server):
    before = server.metric("headrace:tool_calls_total")
    count = sum(len(c.calls) for c in asked(client, tools=TOOLS, tool_choice="required", n=3))
    assert count and server.metric("headrace:tool_calls_total") - before == 2 * count  # whole, and streamed


def test_no_answer_has_an_empty_list_of_calls(server):
    kinds: list[dict[str, Any]] = [{}, {"tools": []}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required"}]
    for fields in kinds:
        for stream in (False, True):
            text = server.post(CHAT, messages=MESSAGES, max_tokens=40, seed=1, stream=stream, **fields).text
            assert "choices" in text and not EMPTY_LIST.search(text)


def test_an_answer_in_a_form_beside_calls(client):
    """What is no call is the object that is asked for."""
    for choice in asked(client, tools=TOOLS, response_format=FORM, n=6, temperature=2, max_tokens=150):
        if choice.calls:
            assert choice.content == ""
        elif choice.finish == "stop":
            assert jsonschema_rs.is_valid(PLACE, json.loads(choice.content))
    for choice in asked(client, tools=TOOLS, tool_choice="required", response_format=FORM, n=2):
        assert choice.content == "" and choice.calls


# ---- the conversation ------------------------------------------------------------------------------------------


def history(arguments: Any) -> list[Any]:
    """A conversation with calls, and what the tools have said."""
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": given}}
        for i, (name, given) in enumerate(zip(("find", "ping"), arguments))
    ]
    return [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_0", "content": "at the mill"},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "pong"}]},
    ]


@pytest.mark.parametrize("arguments", [('{"who": "Mia"}', "{}"), ({"who": "Mia"}, ""), ('{"who":"Mia"}', None)])
def test_a_history_with_calls_is_rendered_by_the_template(client, server, llm, arguments):
    messages = history(arguments)
    prompt = llm.chat_prompt(history(({"who": "Mia"}, {})), TOOLS)
    assert "at the mill" in prompt["prompt"] and '<tool_call>\n{"name": "find"' in prompt["prompt"]
    told = server.post(TOKENIZE, messages=messages, tools=TOOLS).json()
    assert told["tokens"] == prompt["prompt_token_ids"]
    [choice] = asked(client, messages=messages, tools=TOOLS, max_tokens=20)
    assert choice.finish


def test_an_answer_with_calls_can_be_sent_back_as_it_is(client):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=named("find"), seed=1, max_tokens=120
    )
    message = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "at the mill"}
    for sent in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        [choice] = asked(client, messages=[*MESSAGES, sent, result], tools=TOOLS, max_tokens=10)
        assert choice.finish


# ---- what is refused -------------------------------------------------------------------------------------------


def refusal(server, **fields: Any) -> tuple[str, str]:
    """(param, message) of a request that is refused."""
    answer = server.post(CHAT, messages=MESSAGES, max_tokens=4, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["param"], error["message"]


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "find", **function}}


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"functions": [{"name": "find"}]}, "functions", "newer names"),
        ({"tools": TOOLS, "function_call": {"name": "find"}}, "function_call", "newer names"),
        ({"tool_choice": "required"}, "tool_choice", "is required"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "is required"),
        ({"tools": TOOLS, "tool_choice": named("nobody")}, "tool_choice", "names nobody"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "any"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "must be none, auto, required"),
        ({"tools": [tool(), tool()]}, "tools", "tools[1] has the name of another tool: find"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "tools[0] needs a name"),
        ({"tools": [tool(name="a b")]}, "tools", "tools[0] needs a name"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0].type is web_search"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools", "must describe an object"),
        ({"tools": [tool(parameters=[1])]}, "tools", "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"not": {"properties": {"a": {"pattern": "a"}}}})]}, "tools", "#/not cannot be"),
        ({"tools": [tool(parameters={"properties": {"a": {"uniqueItems": True}}})]}, "tools", "uniqueItems cannot be"),
        ({"tools": [tool(parameters={"properties": {"a": {"$ref": "http://x/y"}}})]}, "tools", "leads to no schema"),
        ({"tools": [tool(parameters={"properties": {"a": {"pattern": "(?=a)"}}})]}, "tools", "lookahead"),
        (
            {"tools": [tool(description="", parameters={"properties": {"a": {"enum": ["a" * 270_000]}}})]},
            "tools",
            "262",
        ),
        ({"tools": [tool(name=f"t{i}") for i in range(129)]}, "tools", "129 tools: at most 128"),
        ({"tools": TOOLS, "tool_choice": "required", "use_beam_search": True, "n": 2}, "tools", "tools"),
        ({"tools": TOOLS, "parallel_tool_calls": 3}, "parallel_tool_calls", "parallel_tool_calls"),
    ],
)
def test_what_is_wrong_with_tools_is_named(server, fields, param, word):
    told = refusal(server, **fields)
    assert told[0] == param and word in told[1]
    assert "constraint" not in told[1]


def test_values_without_effect_may_be_sent(client, server):
    [plain] = asked(client, max_tokens=8)
    kinds: list[dict[str, Any]] = [{"tools": []}, {"tools": None, "tool_choice": "none"}]
    for fields in [*kinds, {"functions": [], "function_call": "auto"}]:
        answer = server.post(CHAT, messages=MESSAGES, max_tokens=8, seed=1, **fields)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == plain.content


def test_a_template_without_tools_has_calls_only_where_they_are_demanded(client, server):
    for tool_choice in (None, "auto"):
        param, message = refusal(server, tools=TOOLS, chat_template=TURNS, tool_choice=tool_choice)
        assert param == "tools" and "tool_choice" in message
    counted = server.post(TOKENIZE, messages=MESSAGES, tools=TOOLS, chat_template=TURNS + "{{ tools }}")
    assert counted.status_code == 200, "no call is read there"
    extra = {"chat_template": TURNS}
    [choice] = asked(client, extra, tools=TOOLS, tool_choice="none", max_tokens=8)
    assert not choice.calls
    for choice in asked(client, extra, tools=TOOLS, tool_choice="required", n=3):
        check_calls(choice)
        assert len(choice.calls) == 1 and choice.finish == "tool_calls" and choice.content == ""
    fields: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "seed": 1, "max_tokens": 120}
    for name in SCHEMAS:
        [choice] = asked(client, extra, tools=TOOLS, tool_choice=named(name))
        check_calls(choice)
        assert [called for called, _ in choice.named] == [name] and choice.finish == "stop"
        answer = client.chat.completions.create(**fields, tool_choice=named(name), extra_body=extra, logprobs=True)
        text = "".join(entry.token for entry in answer.choices[0].logprobs.content)
        assert "name" not in text and text.lstrip().startswith("{"), "the arguments alone"


# ---- formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", MARKERS)
def test_a_request_s_own_template_tells_the_format(client, dialect):
    extra = {"chat_template": TURNS + MARKERS[dialect]}
    fields: dict[str, Any] = {"tools": TOOLS, "max_tokens": 150}
    for choice in asked(client, extra, **fields, tool_choice="required", n=2):
        assert choice.calls and choice.finish in ("tool_calls", "length")
        if choice.finish == "tool_calls":
            check_calls(choice)
        assert all(
            re.fullmatch("[0-9a-f]{9}" if dialect == "mistral" else "call_[0-9a-f]{24}", c[0]) for c in choice.calls
        )
    for choice in asked(client, extra, **fields, tool_choice="required", n=2, parallel_tool_calls=False):
        assert len(choice.calls) == 1 and choice.finish == "tool_calls"
        check_calls(choice)
    [choice] = asked(client, extra, **fields, tool_choice=named("ping"))
    assert choice.named == [("ping", "{}")] and choice.finish == "stop"
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1, **fields, tool_choice=named("ping"), logprobs=True, extra_body=extra
    )
    text = "".join(entry.token for entry in answer.choices[0].logprobs.content)
    starts = {"hermes": ("<tool_call>",), "llama3": ("{", "<|python_tag|>"), "mistral": ("[TOOL_CALLS]",)}
    assert text.lstrip().startswith(starts[dialect])


SPECIAL = {
    "hermes": ("</think>", "<tool_call>", "</tool_call>"),
    "llama3": ("</think>", "<|python_tag|>", "<unused>"),
    "mistral": ("</think>", "[TOOL_CALLS]", "<unused>"),
    "json": ("</think>", "<unused>", "<unused2>"),
}
"""In place of the tokens of roles, so that they are special tokens with these ids: 1, 2 and 3."""
UNTHINK, MARKER = 1, 2


@pytest.fixture(scope="module", params=SPECIAL)
def formatted(request, tinyworld_checkpoint, tmp_path_factory):
    """(server, client, dialect): `--tool-format`, and a tokenizer in which the format's markers are special tokens."""
    folder = shutil.copytree(tinyworld_checkpoint, tmp_path_factory.mktemp(request.param) / "hf")
    rename(folder, SPECIAL[request.param])
    flags = ("--served-model-name", "tiny", "--tool-format", request.param)
    with served(folder, *flags) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as made:
        yield running, made, request.param


def rename(folder: Path, names: tuple[str, ...]) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        for old, new in zip(("<|system|>", "<|user|>", "<|assistant|>"), names):
            text = text.replace(old, new)
        (folder / file).write_text(text)


@pytest.fixture
def opening(formatted):
    """What makes a model of a format call a tool where it may: its marker, or the first brace."""
    server, _, dialect = formatted
    [brace] = server.post(TOKENIZE, prompt="{").json()["tokens"]
    return {str(brace if dialect == "json" else MARKER): 100}


def test_a_server_s_format_of_calls(formatted, opening):
    _, client, dialect = formatted
    extra: dict[str, Any] = {"chat_template": TURNS}
    for choice in asked(client, extra, tools=TOOLS, tool_choice="required", n=2, parallel_tool_calls=False):
        check_calls(choice)
        assert len(choice.calls) == 1 and choice.finish == "tool_calls"
    [choice] = asked(client, extra, tools=TOOLS, tool_choice=named("find"))
    check_calls(choice)
    assert choice.finish == "stop"
    chosen = asked(client, extra, tools=TOOLS, n=2, parallel_tool_calls=False, logit_bias=opening, logprobs=True)
    for choice in chosen:
        check_calls(choice)
        assert len(choice.calls) == 1 and choice.finish == "tool_calls" and choice.content == ""
        tokens = [entry.token for entry in choice.logprobs]
        assert choice.named[0][1] in "".join(tokens), "arguments are the tokens' text"
        assert tokens[0] == SPECIAL[dialect][1] or dialect == "json"
    [choice] = asked(client, extra, tools=TOOLS, max_tokens=6, logit_bias={str(MARKER): -100, "0": -100})
    assert choice.finish == "length" and not choice.calls


@pytest.mark.parametrize("formatted", ["hermes", "mistral", "llama3"], indirect=True)
def test_a_marker_that_is_a_special_token_is_no_text(formatted):
    """As much of a call as there is when the limit comes: its marker is never shown as content."""
    _, client, dialect = formatted
    for most in (1, 2, 3, 8, 20):
        extra = {"chat_template": TURNS, "logit_bias": {str(MARKER): 100}}
        [choice] = asked(client, extra, tools=TOOLS, max_tokens=most)
        assert SPECIAL[dialect][1] not in choice.content and choice.content.strip() == ""


# ---- reasoning -------------------------------------------------------------------------------------------------

THINKS = TURNS + "<think>\n"


@pytest.mark.parametrize("formatted", ["hermes"], indirect=True)
@pytest.mark.parametrize("kind", ["text", "form", "call", "form or call"])
def test_reasoning_is_apart_from_what_follows(formatted, kind):
    """The token that ends it is likelier than others, but not the only one, so that there is some reasoning."""
    _, client, _ = formatted
    kinds: dict[str, dict[str, Any]] = {
        "text": {},
        "form": {"response_format": FORM},
        "call": {"tools": TOOLS, "tool_choice": "required"},
        "form or call": {"tools": TOOLS, "response_format": FORM},
    }
    fields = kinds[kind] | {
        "model": "tiny",
        "messages": MESSAGES,
        "seed": 4,
        "n": 8,
        "max_tokens": 150,
        "logit_bias": {UNTHINK: 2},
    }
    extra = {"chat_template": THINKS, "request_id": "mine", "return_token_ids": True}
    answer = client.chat.completions.create(**fields, extra_body=extra)
    chunks = list(
        client.chat.completions.create(**fields, extra_body=extra, stream=True, stream_options={"include_usage": True})
    )
    choices = gathered(answer)
    assert joined(chunks, n=8) == choices and any(choice.reasoning for choice in choices)
    spent = 0
    for choice, sent in zip(choices, answer.choices):
        ids = sent.token_ids
        spent += ids.index(UNTHINK) + 1 if UNTHINK in ids else len(ids)
        assert "</think>" not in choice.reasoning and choice.reasoning == choice.reasoning.strip()
        if UNTHINK not in ids:
            assert choice.finish in ("length", "stop") and not choice.content and not choice.calls
        elif choice.finish in ("stop", "tool_calls"):
            assert kind == "text" or bool(choice.calls) != bool(choice.content)
            if choice.calls:
                check_calls(choice)
            elif kind != "text":
                assert jsonschema_rs.is_valid(PLACE, json.loads(choice.content))
    for usage in (answer.usage, chunks[-1].usage):
        assert usage.completion_tokens_details.reasoning_tokens == spent
    hidden = client.chat.completions.create(**fields, extra_body={**extra, "include_reasoning": False})
    for choice, shown in zip(gathered(hidden), choices):
        assert (choice.reasoning, choice.content, choice.calls) == ("", shown.content, shown.calls)
    assert hidden.usage.completion_tokens_details.reasoning_tokens == spent


def test_a_template_that_does_not_reason_has_no_count_of_it(client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4)
    assert answer.usage.completion_tokens_details is None and answer.choices[0].message.reasoning is None


def test_reasoning_that_never_ends_is_reasoning(client):
    extra = {"chat_template": THINKS, "logit_bias": {"0": -100}}
    fields: dict[str, Any] = {"max_tokens": 30, "response_format": FORM}
    [choice] = asked(client, extra, **fields)
    assert choice.reasoning and choice.content == "" and choice.finish == "length"
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1, **fields, extra_body={**extra, "ignore_eos": True}
    )
    assert answer.usage.completion_tokens_details.reasoning_tokens == answer.usage.completion_tokens == 30


@pytest.mark.parametrize(
    ("start", "goes_on"), [("<think>\nSo", True), ("<think>So</think>\n", False), ("So", False), ("<think></thi", None)]
)
def test_a_message_goes_on_in_its_reasoning_or_behind_it(client, start, goes_on):
    begun = [*MESSAGES, {"role": "assistant", "content": start}]
    extra = {"chat_template": TURNS + "{# <think> #}", "continue_final_message": True, "logit_bias": {"0": -100}}
    fields: dict[str, Any] = {"messages": begun, "max_tokens": 12}
    [choice] = asked(client, extra, **fields)
    if goes_on is not None:
        assert bool(choice.reasoning) == goes_on and bool(choice.content) == (not goes_on)
    answer = client.chat.completions.create(model="tiny", seed=1, **fields, extra_body=extra)
    told = answer.usage.completion_tokens_details.reasoning_tokens
    assert told == (12 if choice.reasoning and not choice.content else 0)


# ---- an engine that dies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("formatted", ["hermes"], indirect=True)
def test_calls_and_reasoning_survive_the_death_of_the_engine(formatted):
    server, client, _ = formatted
    kinds: list[dict[str, Any]] = [
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": named("find"), "logprobs": True},
        {"tools": TOOLS, "logit_bias": {MARKER: 100}, "n": 2},
        {"response_format": FORM, "logit_bias": {UNTHINK: 2}},
    ]
    fields = [
        {"model": "tiny", "messages": MESSAGES, "seed": seed, "max_tokens": 120, **kinds[seed % len(kinds)]}
        for seed in range(12)
    ]
    extras = [{"request_id": f"r{i}", "chat_template": THINKS if i % 4 == 3 else TURNS} for i in range(12)]
    expected = [gathered(client.chat.completions.create(**f, extra_body=e)) for f, e in zip(fields, extras)]
    restarts = server.client.get("/health").json()["restarts"]

    def one(i: int) -> list[Choice]:
        def chunks():
            """Of one stream; the fifth kills the engine."""
            for seen, chunk in enumerate(
                client.chat.completions.create(**fields[i], extra_body=extras[i], stream=True)
            ):
                if i == 5 and seen == 4:
                    os.kill(server.instance_pid(), signal.SIGKILL)
                yield chunk

        return joined(chunks(), fields[i].get("n", 1))

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == expected
    until(lambda: server.client.get("/health").json() == {"status": "ready", "restarts": restarts + 1})
