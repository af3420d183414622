"""Ids of requests, HEAD, paths as clients write them, and pages of other origins."""

import argparse
import asyncio
import json
import uuid
from typing import Any

import pytest

from headrace.cli import serve
from headrace.errors import ConfigError
from headrace.serve.edge import Edge
from headrace.serve.settings import ServeSettings
from serve.http_kit import ORDINARY, served

KEY = {"Authorization": "Bearer secret"}
PAGE = "https://page.example"
SHORT = {"prompt": "Once", "max_tokens": 2, "temperature": 0}
CONVERSATION = {"messages": [{"role": "user", "content": "Who is Mia?"}], "max_tokens": 2, "temperature": 0}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}


@pytest.fixture(scope="module")
def shared(tinyworld_checkpoint):
    """A server with a key that pages of one origin may use."""
    flags = ("--served-model-name", "tiny", "--api-key", "secret", "--allowed-origins", PAGE)
    with served(tinyworld_checkpoint, *flags) as running:
        yield running


def is_new(name):
    return uuid.UUID(name).hex == name and uuid.UUID(name).version == 4


# ---- ids


def test_every_response_has_an_id_of_its_own(shared):
    client = shared.client
    responses = [
        client.get("/health"),
        client.head("/health"),
        client.get("/v1/models"),  # 401
        client.get("/nowhere", headers=KEY),
        client.put("/v1/models", headers=KEY),
        client.post("/v1/completions", json={"prompt": 1}, headers=KEY),
        client.post("/v1/completions", content=b"a", headers={**KEY, "Content-Encoding": "gzip"}),
        client.post("/v1/completions", json={**SHORT, "stream": True}, headers=KEY),
        client.options("/v1/completions", headers={"Origin": PAGE, **PREFLIGHT}),
    ]
    assert [r.status_code for r in responses] == [200, 200, 401, 404, 405, 400, 415, 200, 200]
    names = [r.headers.get_list("x-request-id") for r in responses]
    assert all(len(each) == 1 and is_new(each[0]) for each in names)
    assert len({each[0] for each in names}) == len(names)


@pytest.mark.parametrize(
    ("path", "fields", "prefix"),
    [
        ("/v1/completions", SHORT, "cmpl-"),
        ("/v1/chat/completions", CONVERSATION, "chatcmpl-"),
        ("/v1/embeddings", {"input": "Once"}, "embd-"),
    ],
)
def test_a_clients_id_comes_back_and_is_the_answers(server, path, fields, prefix):
    mine = {"X-Request-Id": "trace/7f:a_b.c~1"}
    whole = server.client.post(path, json=fields, headers=mine)
    assert whole.headers["x-request-id"] == mine["X-Request-Id"]
    assert whole.json()["id"] == prefix + mine["X-Request-Id"]
    other = server.client.post(path, json=fields)
    assert other.json()["id"] == prefix + other.headers["x-request-id"] and is_new(other.headers["x-request-id"])
    wrong = server.client.post(path, json={**fields, "n": "x"}, headers=mine)
    assert (wrong.status_code, wrong.headers["x-request-id"]) == (400, mine["X-Request-Id"])


def test_the_chunks_of_a_stream_have_the_clients_id(server):
    answer = server.client.post("/v1/completions", json={**SHORT, "stream": True}, headers={"X-Request-Id": "mine"})
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert answer.headers["x-request-id"] == "mine" and {chunk["id"] for chunk in chunks} == {"cmpl-mine"}


def test_the_field_request_id_is_the_answers_where_both_are_sent(server):
    both = server.client.post("/v1/completions", json={**SHORT, "request_id": "field"}, headers={"X-Request-Id": "a"})
    assert (both.json()["id"], both.headers["x-request-id"]) == ("cmpl-field", "a")


@pytest.mark.parametrize("sent", [b"", b"two words", b"x" * 257, b"caf\xe9", b"a\x7f", b"a\tb"])
def test_an_id_that_cannot_be_trusted_in_a_header_is_replaced(server, sent):
    answer = server.client.get("/health", headers=[(b"X-Request-Id", sent)])
    assert answer.status_code == 200 and is_new(answer.headers["x-request-id"])


def test_an_id_of_256_characters_and_the_first_of_two_are_kept(server):
    answer = server.client.get("/health", headers=[("X-Request-Id", "y" * 256), ("X-Request-Id", "second")])
    assert answer.headers.get_list("x-request-id") == ["y" * 256]


async def nothing(*_: Any) -> Any:
    """What an application without a body to read or to send is called with."""


def test_ids_of_the_application_are_replaced():
    sent = []

    async def app(scope, receive, send):
        headers = [(b"X-Request-ID", b"one"), (b"x-request-id", b"two"), (b"a", b"b")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": scope["state"]["request_id"].encode()})

    async def keep(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", b"mine")]}
    asyncio.run(Edge(app)(scope, nothing, keep))
    assert sent[0]["headers"] == [(b"a", b"b"), (b"x-request-id", b"mine")] and sent[1]["body"] == b"mine"


def test_an_error_of_the_server_is_logged_with_the_id():
    async def app(scope, receive, send):
        raise KeyError("a bug")

    scope = {"type": "http", "method": "HEAD", "path": "/models/", "headers": [(b"x-request-id", b"mine")]}
    with pytest.raises(KeyError) as failed:
        asyncio.run(Edge(app)(scope, nothing, nothing))
    assert failed.value.__notes__ == ["request mine: HEAD /v1/models"]


# ---- HEAD


def readable(server):
    paths = server.client.get("/openapi.json").json()["paths"]
    documented = [path.replace("{name}", server.model) for path, methods in paths.items() if "get" in methods]
    assert len(documented) >= 5
    return [*documented, "/ping", "/openapi.json", "/", "/playground/app.js", "/playground/icon.svg"]


def test_head_is_get_without_the_body(server):
    for path in readable(server):
        got, head = server.client.get(path), server.client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        varying = {"date", "x-request-id", *(["content-length"] if path == "/metrics" else [])}
        assert head.headers.keys() == got.headers.keys(), path
        assert all(head.headers[name] == got.headers[name] for name in set(got.headers) - varying), path


def test_head_of_a_stream_without_end_ends(server):
    head = server.client.head("/playground/live")
    assert head.status_code == 200 and head.headers["content-type"].startswith("text/event-stream")
    assert server.client.get("/health").status_code == 200


def test_head_of_what_cannot_be_read(shared):
    assert shared.client.head("/v1/models").status_code == 401
    assert shared.client.head("/nowhere", headers=KEY).status_code == 404
    assert shared.client.head("/v1/models/other", headers=KEY).status_code == 404
    refused = shared.client.head("/v1/completions", headers=KEY)
    assert (refused.status_code, refused.headers["allow"], refused.content) == (405, "POST", b"")
    assert shared.client.put("/v1/models", headers=KEY).headers["allow"] == "GET, HEAD"


# ---- paths


@pytest.mark.parametrize(
    ("path", "fields", "kind"),
    [
        ("/completions", SHORT, "text_completion"),
        ("/chat/completions", CONVERSATION, "chat.completion"),
        ("/embeddings", {"input": "Once"}, "list"),
    ],
)
def test_openais_paths_with_and_without_v1_and_a_slash(server, path, fields, kind):
    for each in (path, f"{path}/", f"/v1{path}", f"/v1{path}/", f"/v1{path}//"):
        answer = server.post(each, **fields)
        assert answer.status_code == 200 and answer.json()["object"] == kind, each


def test_the_models_with_and_without_v1_and_a_slash(server):
    for path in ("/models", "/models/", "/v1/models/"):
        assert server.client.get(path).json() == server.client.get("/v1/models").json()
    for path in ("/models/tiny", "/models/tiny/", "/v1/models/tiny/"):
        assert server.client.get(path).json()["id"] == "tiny"
    assert server.client.get("/models/other").status_code == 404


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/metrics", "/tokenize", "/openapi.json"])
def test_other_paths_may_end_in_a_slash(server, path):
    got = server.post(f"{path}/", prompt="a") if path == "/tokenize" else server.client.get(f"{path}/")
    assert got.status_code == 200


def test_a_key_is_asked_for_by_the_path_that_is_served(shared):
    for path in ("/health/", "/version/", "//"):
        assert shared.client.get(path).status_code == 200, path
    for path in ("/v1/models/", "/models", "/models/", "/models/tiny", "/v1/health", "/health/x", "/metrics/../models"):
        assert shared.client.get(path).status_code == 401, path
    assert shared.client.post("/chat/completions", json=CONVERSATION).status_code == 401
    assert shared.client.post("/chat/completions", json=CONVERSATION, headers=KEY).status_code == 200


# ---- other origins


def cors(response):
    return {name for name in response.headers if name.startswith("access-control-")}


def test_no_origin_is_allowed_unless_the_operator_says_so(server):
    page = {"Origin": PAGE}
    assert cors(server.client.get("/v1/models", headers=page)) == set()
    assert cors(server.client.post("/v1/completions", json=SHORT, headers=page)) == set()
    preflight = server.client.options("/v1/chat/completions", headers={**page, **PREFLIGHT})
    assert preflight.status_code == 405 and cors(preflight) == set()


def test_pages_of_an_allowed_origin_can_read_answers_streams_and_errors(shared):
    page, client = {"Origin": PAGE}, shared.client
    for response in (
        client.get("/v1/models", headers={**page, **KEY}),
        client.post("/v1/completions", json=SHORT, headers={**page, **KEY}),
        client.post("/v1/completions", json={**SHORT, "stream": True}, headers={**page, **KEY}),
        client.post("/v1/completions", json={"prompt": 1}, headers={**page, **KEY}),
        client.get("/v1/models", headers=page),
        client.get("/nowhere", headers={**page, **KEY}),
        client.head("/health", headers=page),
    ):
        assert response.headers["access-control-allow-origin"] == PAGE and "Origin" in response.headers["vary"]
        exposed = response.headers["access-control-expose-headers"].lower()
        assert "x-request-id" in exposed and "retry-after" in exposed
        assert "access-control-allow-credentials" not in response.headers


def test_a_preflight_needs_no_key_and_reads_nothing(shared):
    for path in ("/v1/chat/completions", "/models", "/metrics", "/health/"):
        answer = shared.client.options(path, headers={"Origin": PAGE, **PREFLIGHT})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        assert "POST" in answer.headers["access-control-allow-methods"] and "vllm" not in answer.text
        assert {"authorization", "content-type"} <= set(answer.headers["access-control-allow-headers"].split(", "))


@pytest.mark.parametrize("origin", ["https://other.example", "http://page.example", f"{PAGE}:8443", "null", ""])
def test_pages_of_other_origins_can_read_nothing(shared, origin):
    preflight = shared.client.options("/v1/chat/completions", headers={"Origin": origin, **PREFLIGHT})
    assert preflight.status_code == 400 and "access-control-allow-origin" not in preflight.headers
    assert "access-control-allow-origin" not in shared.client.get("/health", headers={"Origin": origin}).headers


def test_options_that_is_no_preflight_needs_the_key(shared):
    assert shared.client.options("/v1/models").status_code == 401
    assert shared.client.options("/v1/models", headers={"Origin": PAGE}).status_code == 401
    assert shared.client.options("/v1/models", headers=dict(PREFLIGHT)).status_code == 401
    assert shared.client.options("/v1/models", headers=KEY).status_code == 405


def test_a_page_cannot_send_what_browsers_send_unasked(shared, server):
    form = "application/x-www-form-urlencoded"
    body = json.dumps(ORDINARY)
    for kind in (form, "text/plain;charset=UTF-8", "multipart/form-data", ""):
        headers = {"Origin": PAGE, "Content-Type": kind, **KEY}
        answer = shared.client.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"], kind
        assert server.client.post("/v1/completions", content=body, headers={"Origin": server.url}).status_code == 415
    headers = {"Origin": PAGE, "Content-Type": "Application/JSON; charset=utf-8", **KEY}
    assert shared.client.post("/v1/completions", content=body, headers=headers).status_code == 200
    assert server.client.post("/v1/completions", content=body, headers={"Content-Type": form}).status_code == 200


# ---- settings


@pytest.mark.parametrize(
    "origin", ["*", PAGE, "http://localhost:3000", "http://[::1]:3000", "app://files", "chrome-extension://abcdef"]
)
def test_origins(origin):
    assert ServeSettings(allowed_origins=(origin,)).allowed_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        "page.example",
        "https://page.example/",
        "https://page.example/chat",
        "https://*.example",
        "https://Page.example",
        "https://page.example:443",
        "http://page.example:80",
        "https://user@page.example",
        "https://page.example:x",
        "https://",
        "null",
        "",
    ],
)
def test_what_no_browser_sends_is_no_origin(origin):
    with pytest.raises(ConfigError, match="allowed_origins"):
        ServeSettings(allowed_origins=(PAGE, origin))


def test_every_page_with_cookies_is_refused():
    with pytest.raises(ConfigError, match="allow_credentials"):
        ServeSettings(allowed_origins=("*",), allow_credentials=True)
    assert ServeSettings(allowed_origins=(PAGE,), allow_credentials=True).allow_credentials


@pytest.mark.parametrize("words", [[PAGE, "http://localhost:3000"], [json.dumps([PAGE, "http://localhost:3000"])]])
def test_lists_are_words_or_one_json_array_as_vllm_takes_it(words):
    assert parsed("--allowed-origins", *words).allowed_origins == (PAGE, "http://localhost:3000")
    assert parsed("--allowed-methods", '["GET", "POST"]').allowed_methods == ("GET", "POST")
    assert parsed("--allowed-headers", "authorization").allowed_headers == ("authorization",)
    assert parsed().allowed_origins == () and parsed().allowed_methods == parsed().allowed_headers == ("*",)


@pytest.mark.parametrize("value", ['["a"', "[1]", '[""]', "", '["a", null]'])
def test_lists_that_are_none_are_refused(value, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("--allowed-origins", value)
    assert ended.value.code == 2 and "--allowed-origins" in capsys.readouterr().err


def parsed(*flags):
    parser = argparse.ArgumentParser()
    serve.add(parser.add_subparsers())
    return parser.parse_args(["serve", "model", *flags])
