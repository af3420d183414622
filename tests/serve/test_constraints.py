"""Answers that are held to a schema, a pattern, a list, a grammar or without words, over HTTP and by the engine."""

import asyncio
import itertools
import json
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jsonschema_rs
import psutil
import pytest

from headrace import LLM, SamplingParams
from headrace.engine.schedule.constraint import Constraint
from headrace.instance.server import Instance
from headrace.instance.wire import Delta, EventBatch, Resume
from headrace.llm.records import ResumeRecord
from headrace.serve.protocol.fields import CHAT, COMPLETIONS
from headrace.serve.transcript import Transcript
from serve.gateway_kit import begun, check_stream, start
from serve.http_kit import until

PROMPT = "Write as JSON: Mia has the lamp."
MESSAGES = [{"role": "user", "content": PROMPT}]
ASKED: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": PROMPT}, CHAT: {"messages": MESSAGES}}
BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
END = "<|end|>"

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "who": {"enum": ["Mia", "Finn", "Lily"]},
        "things": {"type": "array", "items": {"enum": ["ball", "cup", "lamp"]}, "minItems": 1, "maxItems": 3},
        "coins": {"type": "integer", "minimum": 0, "maximum": 99},
        "note": {"type": "string", "pattern": "^[a-z ]{0,8}$"},
    },
    "required": ["who", "things", "coins"],
    "additionalProperties": False,
}
STRICT: dict[str, Any] = {
    "$defs": {"Home": {"type": "object", "properties": {"at": {"const": "mill"}}, "required": ["at"]}},
    "title": "Person",
    "type": "object",
    "properties": {
        "home": {"anyOf": [{"$ref": "#/$defs/Home"}, {"type": "null"}]},
        "seen": {"type": "string", "format": "date", "description": "the day"},
    },
    "required": ["home", "seen"],
    "additionalProperties": False,
}
STRICT["$defs"]["Home"]["additionalProperties"] = False
CHOICES = ["Mia", "Mia and Finn", "nobody"]
PATTERN = r"[A-Z][a-z]{2,8}, ([0-9]{1,3}|none)\."
GRAMMAR = r"""
start: "I saw " thing (" and " thing)? "."
thing: "a " NOUN
NOUN: /ball|cup|lamp/
"""
SEEN = r"I saw a (ball|cup|lamp)( and a (ball|cup|lamp))?\."
WORDS = [" the", "e", "li"]


def follows(schema: dict[str, Any], text: str) -> bool:
    return jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(json.loads(text))


def has_none(text: str) -> bool:
    return bool(text) and not any(word in text for word in WORDS)


class Kind(NamedTuple):
    """A way to constrain an answer: in a request, for the engine, and what the answer must be."""

    sent: dict[str, Any]
    params: dict[str, Any]
    fits: Callable[[str], object]
    ends: bool = True
    """Whether every answer ends by itself."""


def of_schema(schema: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The `response_format` of a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **options}}


KINDS = {
    "schema": Kind(
        {"response_format": of_schema(SCHEMA)},
        {"constraint": Constraint.json_schema(SCHEMA)},
        lambda text: follows(SCHEMA, text),
    ),
    "strict schema": Kind(
        {"response_format": of_schema(STRICT, strict=True, description="of a person")},
        {"constraint": Constraint.json_schema(STRICT, strict=True)},
        lambda text: follows(STRICT, text),
    ),
    "schema as text": Kind(
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}},
        {"constraint": Constraint.json_schema(json.dumps(SCHEMA))},
        lambda text: follows(SCHEMA, text),
    ),
    "schema with space": Kind(
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": r"[ \n]{0,2}"}},
        {"constraint": Constraint.json_schema(SCHEMA, r"[ \n]{0,2}")},
        lambda text: follows(SCHEMA, text),
    ),
    "pattern": Kind(
        {"structured_outputs": {"regex": PATTERN}},
        {"constraint": Constraint.regex(PATTERN)},
        lambda text: re.fullmatch(PATTERN, text),
    ),
    "list": Kind(
        {"structured_outputs": {"choice": CHOICES}}, {"constraint": Constraint.choice(CHOICES)}, CHOICES.__contains__
    ),
    "grammar": Kind(
        {"structured_outputs": {"grammar": GRAMMAR}},
        {"constraint": Constraint.lark(GRAMMAR)},
        lambda text: re.fullmatch(SEEN, text),
    ),
    "words": Kind(
        {"bad_words": WORDS, "ignore_eos": True},
        {"bad_words": tuple(WORDS), "ignore_eos": True},
        has_none,
        ends=False,
    ),
    "words of a pattern": Kind(
        {"structured_outputs": {"regex": PATTERN}, "bad_words": WORDS},
        {"constraint": Constraint.regex(PATTERN), "bad_words": tuple(WORDS)},
        lambda text: re.fullmatch(PATTERN, text) and has_none(text),
    ),
}


def ask(server, path: str, **fields: Any) -> dict[str, Any]:
    answer = server.post(path, **ASKED[path], **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(answer):
    """The chunks of a stream, as they come."""
    for line in answer.iter_lines():
        if line and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def streaming(server, path: str, **fields: Any):
    return server.client.stream("POST", path, json={**ASKED[path], **fields, "stream": True})


def streamed(server, path: str, **fields: Any) -> list[dict[str, Any]]:
    """What a stream's chunks are together, as choices of an answer."""
    found = [{"text": "", "token_ids": [], "scores": [], "end": (None, None)} for _ in range(fields.get("n", 1))]
    with streaming(server, path, **fields) as answer:
        for chunk in events(answer):
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                told = found[choice["index"]]
                assert told["end"][0] is None, "a chunk after the end"
                told["text"] += text_of(choice)
                told["token_ids"] += choice.get("token_ids") or []
                told["scores"] += scores_of(choice)
                told["end"] = choice["finish_reason"], choice["stop_reason"]
    return found


def whole(server, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The same of an answer that is not streamed."""
    return [
        {
            "text": text_of(choice),
            "token_ids": choice["token_ids"] or [],
            "scores": scores_of(choice),
            "end": (choice["finish_reason"], choice["stop_reason"]),
        }
        for choice in ask(server, path, **fields)["choices"]
    ]


def generated(llm: LLM, path: str, **params: Any) -> list[dict[str, Any]]:
    """The same of the engine in this process."""
    prompt: Any = llm.chat_prompt(MESSAGES) if path == CHAT else PROMPT
    return [
        {
            "text": choice.text,
            "token_ids": choice.token_ids,
            "scores": [table[token].logprob for token, table in zip(choice.token_ids, choice.logprobs or ())],
            "end": (choice.finish_reason, choice.stop_reason),
        }
        for choice in llm.generate(prompt, SamplingParams(**params))[0].outputs
    ]


def text_of(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return choice["text"]
    return choice["message" if "message" in choice else "delta"].get("content") or ""


def tokens_of(choice: dict[str, Any]) -> list[str]:
    told = choice["logprobs"] or {}
    return told["tokens"] if "tokens" in told else [entry["token"] for entry in told.get("content", ())]


def scores_of(choice: dict[str, Any]) -> list[float]:
    told = choice["logprobs"] or {}
    return told["token_logprobs"] if "tokens" in told else [entry["logprob"] for entry in told.get("content", ())]


# ---- answers ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", KINDS)
def test_an_answer_fits_and_is_the_engines_whole_and_streamed(server, llm, name, path):
    kind = KINDS[name]
    common = {"n": 2, "seed": 7, "max_tokens": 150 if kind.ends else 24}
    scored = {"logprobs": 1} if path == COMPLETIONS else {"logprobs": True, "top_logprobs": 1}
    for jump in (True, False):
        fields = {**kind.sent, **common, **scored, "jump_forward": jump, "return_token_ids": True}
        choices = whole(server, path, **fields)
        for choice in choices:
            assert kind.fits(choice["text"]), choice["text"]
            assert len(choice["scores"]) == len(choice["token_ids"])
            assert choice["end"] == ("stop", None) or not kind.ends
        assert streamed(server, path, **fields) == choices
        assert generated(llm, path, **kind.params, **common, logprobs=1, jump_forward=jump) == choices


@BOTH
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.ends])
def test_tokens_beside_log_probabilities_make_up_the_text(server, name, path):
    kind = KINDS[name]
    scored = {"logprobs": 3} if path == COMPLETIONS else {"logprobs": True, "top_logprobs": 3}
    [choice] = ask(server, path, **kind.sent, **scored, seed=3, max_tokens=150, return_token_ids=True)["choices"]
    tokens = tokens_of(choice)
    assert "".join(tokens).removesuffix(END) == text_of(choice)
    assert len(tokens) == len(choice["token_ids"]) == len(scores_of(choice))
    assert all(score <= 0 for score in scores_of(choice))


def test_forced_tokens_are_counted_and_not_sampled(server):
    fields = {**KINDS["schema"].sent, "seed": 1, "explain": True, "max_tokens": 150}
    before = server.metric("headrace:forced_tokens_total")
    forced = ask(server, COMPLETIONS, **fields)["explanation"]["forced_tokens"]
    assert forced > 0 and server.metric("headrace:forced_tokens_total") - before == forced
    assert ask(server, COMPLETIONS, **fields, jump_forward=False)["explanation"]["forced_tokens"] == 0
    assert server.metric("headrace:forced_tokens_total") - before == forced


@pytest.mark.parametrize("sent", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json": True}}])
def test_any_json(server, llm, sent):
    wants_object = "response_format" in sent
    first, last, quote = (llm.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("{", "}", '"'))
    fields = {**sent, "n": 8, "seed": 2, "max_tokens": 200, "logit_bias": {str(last): 4, str(quote): 4}}
    choices = whole(server, COMPLETIONS, **fields)
    done = [choice["text"] for choice in choices if choice["end"][0] == "stop"]
    assert done and all(isinstance(json.loads(text), dict) or not wants_object for text in done)
    assert all(choice["end"][0] in ("stop", "length") for choice in choices)
    if wants_object:
        [choice] = whole(server, COMPLETIONS, **sent, allowed_token_ids=[first, last], max_tokens=9)
        assert (choice["text"], choice["end"]) == ("{}", ("stop", None))


@pytest.mark.parametrize("sent", [{"response_format": {"type": "text"}}, {"structured_outputs": {}}])
def test_text_is_no_constraint(server, sent):
    fields = {"seed": 5, "max_tokens": 12}
    assert whole(server, COMPLETIONS, **sent, **fields) == whole(server, COMPLETIONS, **fields)


# ---- what an answer begins with --------------------------------------------------------------------------------


def test_an_echo_comes_before_the_constrained_text(server):
    fields = {**KINDS["schema"].sent, "seed": 4, "max_tokens": 150, "echo": True, "logprobs": 1}
    [choice] = ask(server, COMPLETIONS, **fields)["choices"]
    assert choice["text"].startswith(PROMPT) and follows(SCHEMA, choice["text"].removeprefix(PROMPT))
    assert "".join(choice["logprobs"]["tokens"]).removesuffix(END) == choice["text"]
    [told] = streamed(server, COMPLETIONS, **fields)
    assert (told["text"], told["scores"]) == (choice["text"], choice["logprobs"]["token_logprobs"])


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("schema", "{"),
        ("schema", '{"who": "Fi'),
        ("schema", '{"who": "Lily", "things": ["cup", "la'),
        ("strict schema", '{"home": null, "seen": "20'),
        ("pattern", "Mia,"),
        ("list", "Mia"),
        ("grammar", "I saw a cup"),
        ("words", "Mia has a"),
    ],
)
def test_a_message_that_goes_on_fits_as_a_whole(server, name, start, echo):
    kind = KINDS[name]
    messages = [*MESSAGES, {"role": "assistant", "content": start}]
    fields = {**kind.sent, "seed": 6, "max_tokens": 150, "continue_final_message": True, "echo": echo, "n": 2}
    answer = server.post(CHAT, messages=messages, **fields)
    assert answer.status_code == 200, answer.text
    texts = [text_of(choice) for choice in answer.json()["choices"]]
    for text in texts:
        assert text.startswith(start) or not echo
        assert kind.fits(text if echo else start + text), text
    parts = ["", ""]
    with server.client.stream("POST", CHAT, json={**fields, "messages": messages, "stream": True}) as stream:
        for chunk in events(stream):
            for choice in chunk["choices"]:
                parts[choice["index"]] += text_of(choice)
    assert parts == texts


@pytest.mark.parametrize(("name", "start"), [("schema", "[1"), ("pattern", "mia"), ("list", "Finn"), ("grammar", "a")])
def test_a_message_that_cannot_go_on_is_refused(server, name, start):
    messages = [*MESSAGES, {"role": "assistant", "content": start}]
    sent = KINDS[name].sent
    answer = server.post(CHAT, messages=messages, **sent, continue_final_message=True)
    assert answer.status_code == 400 and answer.json()["error"]["param"] in sent
    assert "the text that is to go on does not satisfy it" in answer.json()["error"]["message"]


# ---- what else may end it --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kept", [False, True])
def test_a_stop_string_ends_a_constrained_text(server, path, kept):
    fields = {"structured_outputs": {"regex": "[a-c]{3}END[x-z]{5}"}, "seed": 1, "max_tokens": 40, "n": 2}
    fields |= {"stop": ["END"], "include_stop_str_in_output": kept}
    choices = whole(server, path, **fields)
    for choice in choices:
        assert re.fullmatch("[a-c]{3}" + "END" * kept, choice["text"]) and choice["end"] == ("stop", "END")
    assert streamed(server, path, **fields) == choices


def test_a_text_that_is_complete_ends_whatever_ignores_end_tokens(server):
    fields = {"structured_outputs": {"regex": "(ab){2,4}"}, "seed": 1, "ignore_eos": True, "max_tokens": 40}
    [choice] = whole(server, COMPLETIONS, **fields)
    assert (choice["text"], choice["end"]) == ("abababab", ("stop", None))
    assert streamed(server, COMPLETIONS, **fields) == [choice]


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("name", ["schema", "grammar"])
def test_a_limit_cuts_the_same_text(server, name, jump):
    fields = {**KINDS[name].sent, "seed": 8, "jump_forward": jump, "return_token_ids": True, "logprobs": 0}
    [full] = whole(server, COMPLETIONS, **fields, max_tokens=150)
    for most in (1, 2, 5, 9):
        [cut] = whole(server, COMPLETIONS, **fields, max_tokens=most)
        assert cut["token_ids"] == full["token_ids"][:most] and cut["scores"] == full["scores"][:most]
        assert full["text"].startswith(cut["text"]) and cut["end"] == ("length", None)
        assert streamed(server, COMPLETIONS, **fields, max_tokens=most) == [cut]


def test_a_text_without_any_choice_is_cut_too(server):
    text = "Once upon a time there was a lamp in the garden."
    fields = {"structured_outputs": {"choice": [text]}, "return_token_ids": True}
    [full] = whole(server, COMPLETIONS, **fields, max_tokens=100)
    assert (full["text"], full["end"]) == (text, ("stop", None))
    answer = ask(server, COMPLETIONS, **fields, max_tokens=4)
    [cut] = answer["choices"]
    assert (
        text.startswith(cut["text"]) and cut["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 4
    )
    assert cut["token_ids"] == full["token_ids"][:4]


DEAD_END: dict[str, Any] = {
    "structured_outputs": {"choice": ["b", "cccccccccccc"]},
    "min_tokens": 5,
    "temperature": 100,
    "seed": 1,
}


@BOTH
def test_a_text_that_cannot_be_as_long_as_asked_is_an_error_of_its_choice_alone(server, llm, path):
    fields = {**DEAD_END, "n": 16, "max_tokens": 40, "return_token_ids": True}
    choices = whole(server, path, **fields)
    short = [choice for choice in choices if choice["text"] == "b"]
    assert short and len(short) < len(choices)
    for choice in choices:
        reason, why = choice["end"]
        if choice["text"] == "b":
            assert reason == "error" and why.startswith("structured_outputs, min_tokens: "), why
        else:
            assert (choice["text"], reason, why) == ("cccccccccccc", "stop", None)
    assert streamed(server, path, **fields) == choices
    params = {name: DEAD_END[name] for name in ("min_tokens", "temperature", "seed")}
    constraint = Constraint.choice(DEAD_END["structured_outputs"]["choice"])
    expected = generated(llm, path, **params, constraint=constraint, n=16, max_tokens=40)
    assert [choice["token_ids"] for choice in expected] == [choice["token_ids"] for choice in choices]
    assert all(choice["finish_reason"] for choice in ask(server, path, max_tokens=5)["choices"])


@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_text_without_any_choice_that_is_too_short_is_an_error(server, logprobs):
    fields = {"structured_outputs": {"choice": ["Mia"]}, "min_tokens": 9, "logprobs": logprobs}
    [choice] = whole(server, COMPLETIONS, **fields)
    reason, why = choice["end"]
    assert (choice["text"], reason) == ("Mia", "error") and why.startswith("structured_outputs, min_tokens: ")
    assert streamed(server, COMPLETIONS, **fields) == [choice]


def test_fields_that_leave_no_token_are_an_error(server):
    fields = {"structured_outputs": {"choice": ["eel", "ape"]}, "allowed_token_ids": [5]}
    [choice] = whole(server, COMPLETIONS, **fields)
    reason, why = choice["end"]
    assert (choice["text"], reason) == ("", "error") and why.startswith("structured_outputs, allowed_token_ids: ")


# ---- requests that end early, engines that die -----------------------------------------------------------------


def slow(count: int) -> dict[str, Any]:
    """A schema whose optional properties make a large grammar."""
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}}


def test_requests_that_are_gone_while_their_grammar_compiles(tinyworld_checkpoint):
    """At the gateway, so that it is the engine that compiles."""
    schemas = [slow(150 + i) for i in range(8)]

    async def scenario():
        gateway, watcher = await start(tinyworld_checkpoint)
        params = SamplingParams(seed=1, max_tokens=12)
        ids = [5, 6, 7]
        try:
            tasks = [
                await begun(gateway.open(f"{i}", None, ids, replace(params, constraint=Constraint.json_schema(schema))))
                for i, schema in enumerate(schemas)
            ]
            for task in tasks[1:]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(one, asyncio.CancelledError) for one in done[1:])
            kept = await (await tasks[0]).result()
            assert kept.outputs[0].text.startswith("{") and gateway.unfinished == 0
            assert [told[0] for told in watcher.told].count("arrived") == len(schemas)
            again = await gateway.open("again", None, ids, replace(params, constraint=Constraint.regex("ab")))
            assert (await again.result()).outputs[0].text == "ab"
        finally:
            await gateway.stop()

    asyncio.run(scenario())


def test_a_client_that_hangs_up_while_its_schema_is_tried(server):
    body = json.dumps({**ASKED[COMPLETIONS], "response_format": of_schema(slow(300))}).encode()
    before = server.metric("vllm:request_success_total")
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    [choice] = whole(server, COMPLETIONS, structured_outputs={"regex": "ab"})
    assert choice["text"] == "ab"
    until(lambda: server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") == 0)
    assert server.metric("vllm:request_success_total") - before >= 1


def crowd() -> list[SamplingParams]:
    base = [replace(SamplingParams(max_tokens=40, logprobs=1), **kind.params) for kind in KINDS.values()]
    base += [replace(base[0], jump_forward=False), replace(base[0], n=2, logprobs=None)]
    base += [replace(base[0], stop=('"things"',)), SamplingParams(max_tokens=40, ignore_eos=True)]
    return [replace(params, seed=i) for i, params in enumerate(base)]


DEATHS = 2
ATTEMPTS = 20
"""An engine that is ahead of its gateway may have sent the last token before it dies; then the test asks again."""


def test_constrained_streams_survive_the_death_of_their_engine(tinyworld_checkpoint, llm):
    wanted = crowd()
    ids = llm.tokenizer.encode(PROMPT)
    expected = llm.generate([ids] * len(wanted), wanted)

    async def death_in_a_crowd(gateway, watcher, at):
        watcher.restart.clear()
        watcher.deltas, watcher.kill_at = 0, [at]
        streams = await asyncio.gather(*(gateway.open(f"{i}", None, ids, params) for i, params in enumerate(wanted)))
        await asyncio.gather(*(check_stream(stream, output) for stream, output in zip(streams, expected)))
        await watcher.restart.wait()
        return any(stream.explanation.resumes for stream in streams)

    async def scenario():
        gateway, watcher = await start(tinyworld_checkpoint)
        met = deaths = 0
        try:
            while met < DEATHS and deaths < ATTEMPTS:
                met += await death_in_a_crowd(gateway, watcher, 3 + 90 * met)
                deaths += 1
            assert met == DEATHS and gateway.restarts == deaths and gateway.unfinished == 0
        finally:
            await gateway.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_transcript_of_a_constrained_text_is_a_resume_record_at_every_step(llm, name, logprobs):
    """Without a process: an engine resumes from the transcript after some steps."""
    params = replace(SamplingParams(seed=9, max_tokens=30, n=2, logprobs=logprobs), **KINDS[name].params)
    ids = llm.tokenizer.encode(PROMPT)
    expected = llm.generate([ids], params)[0]
    for steps in (1, 2, 4, 7, 12):
        batches: list[EventBatch] = []
        transcript = Transcript("1", ResumeRecord.begin("name", PROMPT, ids, params))
        for count in (steps, 10_000):
            instance = Instance(llm, batches.append)
            instance._execute(transcript.command(llm.fingerprint))
            assert not instance._compiling
            while instance._busy() and count:
                instance._step()
                count -= 1
            for news in (news for batch in batches for news in batch.events if isinstance(news, Delta)):
                transcript.take(news)
            batches.clear()
            instance._abort("1")
            if not transcript.output.finished and any(c.token_ids for c in transcript.output.outputs):
                assert isinstance(transcript.command(llm.fingerprint), Resume)
        assert transcript.output.outputs == expected.outputs
        assert not llm.frontend.has_work


# ---- what is refused -------------------------------------------------------------------------------------------


OPEN = {"type": "object", "properties": {"a": {"type": "string"}}}
TOO_LONG = "a" * 262_200
SCHEMAS: dict[str, tuple[Any, str]] = {
    "not": ({"not": {"properties": {"a": {"pattern": "a"}}}}, "#/not cannot be honoured"),
    "not deep": ({"properties": {"a": {"items": {"not": {"pattern": "a"}}}}}, "#/properties/a/items/not"),
    "if": ({"if": {"properties": {"a": {"pattern": "a"}}}, "then": {"required": ["b"]}}, "#/if cannot be honoured"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "#/uniqueItems cannot be honoured"),
    "oneOf": ({"oneOf": [{"pattern": "a"}, {"pattern": "b"}]}, "#/oneOf cannot be honoured: a value could fit 0 and 1"),
    "contains": ({"contains": {"type": "integer"}}, "#/contains cannot be honoured"),
    "another document": ({"$ref": "https://example.com/schema.json"}, "#/$ref leads to no schema of this document"),
    "nothing": ({"$ref": "#/$defs/nobody"}, "#/$ref leads to no schema of this document"),
    "itself": ({"$ref": "#"}, "leads back to itself"),
    "dynamic": ({"$dynamicRef": "#a"}, "#/$dynamicRef cannot be honoured"),
    "lookahead": ({"type": "string", "pattern": "(?=a)b"}, "#/pattern is a pattern that cannot be honoured"),
    "lookbehind": ({"type": "string", "pattern": "(?<!a)b"}, "lookbehind"),
    "backreference": ({"type": "string", "pattern": r"(a)\1"}, r"a backreference, \1"),
    "no pattern": ({"type": "string", "pattern": "("}, "a ( is not closed"),
    "options": ({"x-guidance": {"whitespace_flexible": True}}, "#/x-guidance cannot be honoured"),
    "no value": ({"type": "integer", "minimum": 3, "maximum": 2}, "no JSON fits the schema"),
    "no type": ({"type": "text"}, "#/type must be one of null, boolean"),
    "no names": ({"properties": []}, "#/properties must be an object"),
    "too long": ({"enum": [TOO_LONG]}, "at most 262144"),
    "too deep": (json.loads('{"items": ' * 120 + "{}" + "}" * 120), "nested more than 100 deep"),
}
TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "lookahead": ({"regex": "(?!a)b"}, "negative lookahead"),
    "lookbehind": ({"regex": "(?<=a)b"}, "lookbehind"),
    "backreference": ({"regex": r"(a)\1"}, r"a backreference, \1"),
    "word boundary": ({"regex": r"\ba"}, "word boundary"),
    "no pattern": ({"regex": "a("}, "unclosed group"),
    "no text": ({"regex": r"[^\s\S]"}, "no text fits it"),
    "too long": ({"regex": TOO_LONG}, "at most 262144"),
    "no choice": ({"choice": []}, "choices are a list of one or more texts"),
    "a number": ({"choice": ["a", 3]}, "choices are a list of one or more texts"),
    "twice": ({"choice": ["a", "b", "a"]}, "the choice 'a' stands twice"),
    "empty choice": ({"choice": ["a", ""]}, "a choice is empty"),
    "no rule": ({"grammar": "start: nobody"}, 'unknown name: "nobody"'),
    "no grammar": ({"grammar": " "}, "the grammar is empty"),
    "endless": ({"grammar": 'start: "a" start'}, "cannot be honoured"),
    "option": ({"grammar": 'start[temperature=0.5]: "a"'}, "the option temperature"),
    "inner schema": ({"grammar": 'start: %json {"uniqueItems": true}'}, "#/uniqueItems cannot be honoured"),
    "no JSON": ({"json": "{"}, "the schema is no JSON"),
    "no schema": ({"json": "3"}, "must be an object, or true or false"),
    "false": ({"json": False}, "the schema has no value"),
    "two": ({"json": {}, "regex": "a"}, "not json and regex"),
    "none": ({"json_object": False}, "must have one of json, json_object, regex, choice, grammar, not none"),
    "space": ({"json_object": True, "whitespace_pattern": "-"}, "JSON has only space"),
    "space of text": ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern is an option of JSON alone"),
    "tag": ({"structural_tag": {"structures": []}}, "structural_tag cannot be honoured"),
    "unknown": ({"regex": "a", "backend": "any"}, "has no key 'backend'"),
    "of a type": ({"regex": ["a"]}, "regex has a value of the wrong type"),
}
BODIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "both": (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "send one of them",
    ),
    "another type": ({"response_format": {"type": "yaml"}}, "response_format", "is not one of text, json_object"),
    "another key": ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "no key 'schema'"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format", "must be an object with a name"),
    "no inner schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format",
        "must be a JSON schema",
    ),
    "strict": ({"response_format": of_schema({}, strict="yes")}, "response_format", "must be true or false"),
    "strict keyword": (
        {"response_format": of_schema({"items": {"wonder": 1}}, strict=True)},
        "response_format",
        "#/items/wonder is no keyword of JSON Schema",
    ),
    "strict format": (
        {"response_format": of_schema({"format": "wonder"}, strict=True)},
        "response_format",
        "#/format is 'wonder'",
    ),
    "beams": (
        {"structured_outputs": {"regex": "a"}, "use_beam_search": True, "n": 2},
        "structured_outputs",
        "structured_outputs",
    ),
    "word": ({"bad_words": [""]}, "bad_words", "at least 1 character"),
    "words": ({"bad_words": ["a"] * 300}, "bad_words", "at most 256"),
    "no words": ({"bad_words": "a"}, "bad_words", "valid list"),
    "older": ({"guided_json": OPEN}, "guided_json", "guided_json"),
    "SGLang's": ({"regex": "a"}, "regex", "structured_outputs takes it"),
}
WRONG = {
    **{
        f"schema: {name}": ({"response_format": of_schema(s)}, "response_format", word)
        for name, (s, word) in SCHEMAS.items()
    },
    **{f"text: {name}": ({"structured_outputs": s}, "structured_outputs", word) for name, (s, word) in TEXTS.items()},
    **BODIES,
}


@BOTH
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_honoured_is_refused_by_its_field_and_its_place(server, name, path):
    sent, param, word = WRONG[name]
    for stream in (False, True):
        answer = server.post(path, **ASKED[path], **sent, max_tokens=4, stream=stream)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and error["param"] == param
        assert word in error["message"] and len(error["message"]) < 600


def test_what_is_unknown_is_an_annotation_unless_strict(server):
    schema = {**SCHEMA, "wonder": 1, "x-order": ["who"]}
    [choice] = whole(server, COMPLETIONS, response_format=of_schema(schema), seed=1, max_tokens=150)
    assert follows(SCHEMA, choice["text"])


# ---- bombs -----------------------------------------------------------------------------------------------------


def trial_process(server) -> psutil.Process:
    [child] = [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if any("headrace.grammar.trial" in part for part in child.cmdline())
    ]
    return child


BOMBS: dict[str, dict[str, Any]] = {
    "names": {"response_format": of_schema(slow(5000))},
    "more names": {"response_format": of_schema({"properties": {f"p{i}": {} for i in range(12_000)}})},
    "options of a pattern": {"structured_outputs": {"regex": "(a?){3000}a{3000}"}},
}
HARMLESS = {"structured_outputs": {"regex": "(a{1,999}){1,999}"}, "temperature": 0, "max_tokens": 50}


def test_bombs_are_refused_while_a_stream_goes_on(server, llm):
    fields = {"seed": 3, "max_tokens": 400, "ignore_eos": True, "return_token_ids": True}
    expected = llm.generate(PROMPT, SamplingParams(seed=3, max_tokens=400, ignore_eos=True))[0].outputs[0].token_ids
    others = {**KINDS["schema"].sent, "seed": 3, "max_tokens": 150, "return_token_ids": True}
    [schema] = whole(server, COMPLETIONS, **others)
    over = threading.Event()

    def watch():
        """Ordinary streams, one after another, until the bombs are over."""
        seen = 0
        while not (seen and over.is_set()):
            [told] = streamed(server, COMPLETIONS, **fields)
            assert told["token_ids"] == expected
            assert streamed(server, COMPLETIONS, **others) == [schema]
            seen += 1
        return seen

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch)
        try:
            for name, sent in BOMBS.items():
                answer = server.post(COMPLETIONS, **ASKED[COMPLETIONS], **sent, max_tokens=5)
                assert answer.status_code == 400, (name, answer.text)
                assert answer.json()["error"]["param"] in sent, name
        finally:
            over.set()
        assert watcher.result() > 0
    answer = server.post(COMPLETIONS, **ASKED[COMPLETIONS], **HARMLESS)
    assert answer.status_code in (200, 400)
    assert server.client.get("/health").json() == {"status": "ready", "restarts": 0}


def test_a_trial_that_takes_too_long_or_dies_is_followed_by_another(server):
    """A constraint that is new each time, as one that is known needs no trial."""
    numbers = itertools.count()

    def status():
        text = f"a lamp and {next(numbers)} keys"
        return server.post(COMPLETIONS, prompt=PROMPT, structured_outputs={"choice": [text]}).status_code

    assert status() == 200
    first = trial_process(server)
    answer = server.post(COMPLETIONS, **ASKED[COMPLETIONS], **BOMBS["more names"])
    assert answer.status_code == 400 and "make it smaller" in answer.json()["error"]["message"]
    assert not first.is_running() and status() == 200
    second = trial_process(server)
    assert second.pid != first.pid
    second.kill()
    until(lambda: status() == 200 and trial_process(server).pid != second.pid)
    assert not second.is_running()


def test_ids_that_no_vocabulary_has_end_their_own_request_alone(server):
    fields = {"prompt": "a", "structured_outputs": {"choice": ["odd ids", "even ids"]}, "allowed_token_ids": [10**9]}
    refused = server.post("/v1/completions", **fields)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "allowed_token_ids"
    assert server.client.get("/health").json() == {"status": "ready", "restarts": 0}
