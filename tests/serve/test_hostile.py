"""Attacks on a real server. After each, one ordinary request must give the same tokens from the same process."""

import contextlib
import http.client
import json
import socket
import threading
from typing import Any

import pytest

from headrace.serve.protocol.fields import CHAT, COMPLETIONS, DETOKENIZE, EMBEDDINGS, TOKENIZE
from serve.http_kit import ORDINARY, PATIENCE, served, until

MIB = 1 << 20
MESSAGES = [{"role": "user", "content": "Where does Mia live?"}]
LONG: dict[str, Any] = {"prompt": "Once upon a time, Mia", "n": 16, "seed": 1, "max_tokens": 480, "ignore_eos": True}


@pytest.fixture(scope="module")
def attacked(tinyworld_checkpoint):
    with served(tinyworld_checkpoint, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def expected(attacked):
    return attacked.ordinary_tokens()


@pytest.fixture(autouse=True)
def unharmed(request):
    """The server that the tests attack."""
    if "attacked" not in request.fixturenames:
        yield
        return
    server, before = request.getfixturevalue("attacked"), request.getfixturevalue("expected")
    yield
    assert server.ordinary_tokens() == before
    assert server.client.get("/health").json() == {"status": "ready", "restarts": 0}


def refused(answer, status=400):
    """Check an error in OpenAI's shape; returns the field at fault."""
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"].endswith("_error") and (error["code"] is None or isinstance(error["code"], str))
    assert 0 < len(error["message"]) < 1200
    return error["param"]


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def head(path, length, *lines):
    told = [f"POST {path} HTTP/1.1", "Host: here", "Content-Type: application/json", *lines]
    if length is not None:
        told.append(f"Content-Length: {length}")
    return ("\r\n".join(told) + "\r\n\r\n").encode()


def request(path, **fields):
    body = json.dumps(fields).encode()
    return head(path, len(body)) + body


def answer_on(connection, method="POST"):
    """The next answer on a socket: status, headers, body."""
    answer = http.client.HTTPResponse(connection, method=method)
    answer.begin()
    return answer.status, answer.headers, answer.read()


# ---- bodies ----------------------------------------------------------------------------------------------------

DEEP = [b'{"prompt":' + b"[" * n + b"]" * n + b"}" for n in (900, 100_000)]
DEEP += [b'{"prompt":' + b'{"a":' * n + b"1" + b"}" * n + b"}" for n in (900, 100_000)]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, EMBEDDINGS, TOKENIZE, DETOKENIZE])
def test_bodies_that_are_no_requests(attacked, path):
    for body in (
        b"",
        b" ",
        b"[]",
        b"null",
        b"3",
        b'"a"',
        b"{",
        b'{"prompt"',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b"{}}",
        b'{"prompt":"\xff"}',
        rb'{"prompt":"\ud800"}',
        rb'{"\udc00":1}',
        b'{"prompt":"\xed\xa0\x80"}',
        b'{"prompt":NaN}',
        b'{"prompt":"a","temperature":Infinity}',
        b'{"seed":' + b"9" * 10_000 + b"}",
        b"\x00" * 1000,
        *DEEP,
    ):
        answer = attacked.client.post(path, content=body)
        assert answer.status_code == 400, (body[:40], answer.text[:300])
        refused(answer)


def test_of_a_key_that_is_there_twice_the_last_counts(attacked, expected):
    body = json.dumps(ORDINARY).encode()
    twice = attacked.client.post(COMPLETIONS, content=b'{"prompt":{},"temperature":"x",' + body[1:])
    assert twice.json()["choices"][0]["token_ids"] == expected


NUMBERS = [
    b"1e308",
    b"-1e308",
    b"5e-324",
    b"1e999",
    b"-1e999",
    b"NaN",
    b"true",
    b'"1"',
    b"[]",
    b"{}",
    b"1.5",
    b"-0.0",
    *(
        str(n).encode()
        for n in (-1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**30, 10**400)
    ),
]


@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "frequency_penalty",
        "n",
        "logprobs",
        "presence_penalty",
        "repetition_penalty",
        "min_tokens",
        "priority",
        "stop_token_ids",
        "prompt_logprobs",
        "truncate_prompt_tokens",
        "length_penalty",
        "logit_bias",
        "stop",
    ],
)
def test_numbers_of_every_size(attacked, field):
    for number in NUMBERS:
        body = b'{"prompt":"a","max_tokens":2,"%s":%s}' % (field.encode(), number)
        answer = attacked.client.post(COMPLETIONS, content=body)
        assert answer.status_code == 200 or refused(answer) in (field, None), (number, answer.text)


@pytest.mark.parametrize(
    ("path", "field", "item"),
    [
        (COMPLETIONS, "prompt", b"{}"),
        (COMPLETIONS, "prompt", b"true"),
        (COMPLETIONS, "prompt", b"[]"),
        (COMPLETIONS, "stop", b"1"),
        (COMPLETIONS, "stop_token_ids", b"-1"),
        (COMPLETIONS, "allowed_token_ids", b'""'),
        (CHAT, "messages", b"1"),
        (EMBEDDINGS, "input", b"[1.5]"),
        (DETOKENIZE, "tokens", b"null"),
    ],
)
def test_millions_of_mistakes_cost_no_more_than_one(attacked, path, field, item):
    others = {COMPLETIONS: b'"prompt":"a",'}.get(path, b"") if field != "prompt" else b""
    items = b",".join([item] * (7 * MIB // (len(item) + 1)))
    body = b'{%s"%s":[%s]}' % (others, field.encode(), items)
    assert refused(attacked.client.post(path, content=body)) == field


def test_more_than_can_be_served(attacked):
    bodies: tuple[dict[str, Any], ...] = (
        {"prompt": ["a"] * 10_000},
        {"prompt": ["a"] * 1_000_000},
        {"prompt": [5] * 2_000_000},
        {"prompt": [-1]},
        {"prompt": [2**70]},
        {"prompt": [True]},
        {"prompt": [5, "a"]},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ""},
        {"stop": ["x"] * 5000},
        {"stop": "x" * MIB},
        {"stop": ["a", ""]},
        {"stop_token_ids": [5] * 2_000_000},
        {"allowed_token_ids": list(range(100_000))},
        {"allowed_token_ids": [5] * 2_000_000},
        {"logit_bias": {str(i): 1 for i in range(200_000)}},
        {"logit_bias": {str(i): "" for i in range(400_000)}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"\u0663": 1}},
        {"logit_bias": {"5": 1e308}},
        {"logit_bias": {"9" * 5000: 1}},
        {"n": 257},
        {"n": 256, "use_beam_search": True},
        {"x" * MIB: 1},
    )
    for fields in bodies:
        field = next(iter(fields))
        param = refused(attacked.post(COMPLETIONS, **{"prompt": "a", **fields}))
        assert param in (field, field[:60] + "…", "beam_width"), param
    assert refused(attacked.post(EMBEDDINGS, input=["a"] * 1_000_000)) == "input"
    assert refused(attacked.post(COMPLETIONS, prompt="a", model="x" * MIB), 404) == "model"


def test_much_that_can_be_served(attacked):
    for fields in (
        {"n": 256, "max_tokens": 2},
        {"allowed_token_ids": [5] * 100_000, "max_tokens": 2},
        {"stop": ["x" * 1024] * 64, "max_tokens": 2},
        {"logit_bias": {str(i): 1 for i in range(400)}},
    ):
        assert attacked.post(COMPLETIONS, prompt="a", **fields).status_code == 200
    told = attacked.post(TOKENIZE, prompt="word " * 20_000, return_token_strs=True).json()
    assert "".join(told["token_strs"]).replace("Ġ", " ").strip() == ("word " * 20_000).strip()


# ---- HTTP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10 * MIB, 60 * MIB, 70 * MIB])
def test_clients_that_send_everything_before_they_read(attacked, size):
    with connect(attacked) as connection:
        try:
            connection.sendall(head(COMPLETIONS, size))
            for _ in range(size // MIB):
                connection.sendall(b"x" * MIB)
            status, _, body = answer_on(connection)
        except OSError:  # what is far too large is cut off
            assert size > 64 * MIB
        else:
            assert status == 413 and json.loads(body)["error"]["type"] == "invalid_request_error"


def test_bodies_in_chunks_without_a_length(attacked, expected):
    def chunks(data, size):
        for i in range(0, len(data), size):
            yield data[i : i + size]

    small = attacked.client.post(COMPLETIONS, content=chunks(json.dumps(ORDINARY).encode(), 3))
    assert small.json()["choices"][0]["token_ids"] == expected
    refused(attacked.client.post(COMPLETIONS, content=chunks(b" " * (9 * MIB), MIB)), 413)


def test_paths_and_methods_that_are_not_served(attacked):
    for path in (
        "/v2",
        "/v1/completions/x",
        "/v1//completions",
        "/%2e%2e/etc/passwd",
        "/%ff%00",
        "/v1/models/%0d%0aSet-Cookie:x",
        "/playground/../../pyproject.toml",
        "/" + "x" * 5000,
    ):
        refused(attacked.client.get(path), 404)
    for method, path in (
        ("GET", COMPLETIONS),
        ("GET", f"{COMPLETIONS}/"),
        ("DELETE", "/health"),
        ("PUT", "/"),
        ("TRACE", "/metrics"),
        ("BREW", "/v1/models"),
        ("HEAD", CHAT),
    ):
        answer = attacked.client.request(method, path)
        assert answer.status_code == 405 and (method == "HEAD" or refused(answer, 405) is None)
    for lines in (b"GET /nope HTTP/1.1\r\nHost: [\r\n\r\n", b"GET /nope HTTP/1.1\r\nHost: \xff\r\n\r\n"):
        with connect(attacked) as connection:
            connection.sendall(lines)
            assert answer_on(connection, "GET")[0] == 404


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n:\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"G" * 100_000,
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http(attacked, sent):
    with connect(attacked) as connection, contextlib.suppress(OSError):  # it may hang up before it has all
        connection.sendall(sent)
        got = connection.recv(4096)
        assert got == b"" or (got.startswith(b"HTTP/1.1 ") and not got.startswith(b"HTTP/1.1 5"))


def test_pipelined_requests_are_answered_in_order(attacked, expected):
    with connect(attacked) as connection:
        connection.sendall(
            request(COMPLETIONS, **ORDINARY)
            + b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
            + request(COMPLETIONS, **ORDINARY)
        )
        whole = b""
        while whole.count(b'"total_tokens"') < 2:
            whole += connection.recv(65536)
    assert whole.count(b"HTTP/1.1 200") == 3
    assert whole.index(b'"total_tokens"') < whole.index(b'"version"') < whole.rindex(b'"total_tokens"')


def test_old_and_cautious_clients(attacked, expected):
    body = json.dumps(ORDINARY).encode()
    with connect(attacked) as connection:
        connection.sendall(head(COMPLETIONS, len(body)).replace(b"HTTP/1.1", b"HTTP/1.0") + body)
        assert json.loads(answer_on(connection)[2])["choices"][0]["token_ids"] == expected
        assert connection.recv(1) == b""
    with connect(attacked) as connection:
        connection.sendall(head(COMPLETIONS, len(body), "Expect: 100-continue"))
        interim = b""
        while not interim.endswith(b"\r\n\r\n"):
            interim += connection.recv(1)
        assert interim.startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert json.loads(answer_on(connection)[2])["choices"][0]["token_ids"] == expected


def test_what_a_caller_names_stands_in_json_only(attacked):
    evil = 'a\r\nSet-Cookie: b=c\r\n\r\n<script>"\x00'
    answer = attacked.post(COMPLETIONS, **ORDINARY, request_id=evil)
    assert answer.json()["id"] == f"cmpl-{evil}" and "set-cookie" not in answer.headers
    missing = attacked.post(COMPLETIONS, **ORDINARY, model=evil)
    assert refused(missing, 404) == "model" and "set-cookie" not in missing.headers
    streamed = attacked.post(COMPLETIONS, **ORDINARY, request_id=evil, stream=True)
    events = [line for line in streamed.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in events) and json.loads(events[0][6:])["id"] == f"cmpl-{evil}"


def test_a_thousand_connections_that_say_nothing(attacked, expected):
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connect(attacked))
        assert attacked.ordinary_tokens() == expected


# ---- clients that leave ----------------------------------------------------------------------------------------


def kv_usage(server):
    return server.metric("vllm:kv_cache_usage_perc")


def aborts(server):
    return server.metric("headrace:aborts_total")


def generated(server):
    return server.metric("vllm:generation_tokens_total")


def at_rest(server):
    """Nothing runs, no block is held, and no further token is generated."""
    until(lambda: kv_usage(server) == 0 and server.metric("vllm:num_requests_running") == 0)
    assert server.metric("vllm:num_requests_waiting") == 0
    before = generated(server)
    assert [generated(server) for _ in range(5)] == [before] * 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_leaves_frees_its_blocks_and_disturbs_no_other(attacked, stream, half):
    """By closing, or by closing its half: a half-closed connection counts as a disconnect."""
    sibling: dict[str, Any] = {**ORDINARY, "n": 2, "seed": 3, "temperature": 1, "max_tokens": 200, "ignore_eos": True}
    alone = [c["token_ids"] for c in attacked.post(COMPLETIONS, **sibling).json()["choices"]]
    at_rest(attacked)
    before, made, beside = aborts(attacked), generated(attacked), []
    with connect(attacked) as connection:
        connection.sendall(request(COMPLETIONS, **LONG, stream=stream))
        thread = threading.Thread(target=lambda: beside.append(attacked.post(COMPLETIONS, **sibling).json()))
        thread.start()
        if stream:
            assert connection.recv(12) == b"HTTP/1.1 200"
        until(lambda: generated(attacked) > made)
        if half:
            connection.shutdown(socket.SHUT_WR)
            until(lambda: aborts(attacked) > before)
    until(lambda: aborts(attacked) > before)
    thread.join()
    assert [c["token_ids"] for c in beside[0]["choices"]] == alone
    at_rest(attacked)
    assert aborts(attacked) - before == LONG["n"]
    assert generated(attacked) - made < LONG["n"] * LONG["max_tokens"] + 2 * sibling["max_tokens"]


def test_clients_that_leave_before_anything_is_done_for_them(attacked):
    whole = request(COMPLETIONS, **LONG)
    for cut in (1, 20, len(whole) // 2, len(whole) - 1, len(whole)):
        for _ in range(20):
            with connect(attacked) as connection:
                connection.sendall(whole[:cut])
    body = json.dumps(
        {
            "messages": MESSAGES,
            "chat_template": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        }
    ).encode()
    with connect(attacked) as connection:
        connection.sendall(head(CHAT, len(body)) + body)
    assert attacked.post(CHAT, messages=MESSAGES, chat_template="hello", max_tokens=2).status_code == 200
    attacked.ordinary_tokens()
    at_rest(attacked)


def test_a_client_that_never_reads_delays_no_other(attacked, expected):
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(connect(attacked))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request(COMPLETIONS, **LONG, stream=True, logprobs=20))
        assert attacked.ordinary_tokens() == expected
        at_rest(attacked)  # the engine has done them all, or it would be waiting for the reader


# ---- templates -------------------------------------------------------------------------------------------------

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ (messages|map(attribute='__class__')|list)[0].__base__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ 'x' * 10**12 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ [0] * 10**9 }}",
        "{{ 'x'|center(2**40) }}",
        "{{ range(10**12)|list }}",
        "{{ lipsum(n=10**9) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '\\ud800' }}",
        "{{ raise_exception('\\ud800') }}",
        "{{ raise_exception('x' * 10000000) }}",
        "{% set n = namespace(x='a' * 1000) %}{% for i in range(99999) %}{{ n.x }}{% endfor %}",
        "{%- macro f(x) -%}{{ f(x) }}{%- endmacro -%}{{ f(1) }}",
        "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ ''.join(['x' * 1000000] * 100000) }}",
        "{{ strftime_now('%' * 1000000) }}",
        "{{ '' }}",
    ],
)
def test_a_hostile_template_ends_and_chats_go_on_beside_it(attacked, template):
    chats: list[Any] = []
    chat = threading.Thread(
        target=lambda: chats.extend(
            attacked.post(CHAT, messages=MESSAGES, temperature=0, max_tokens=4) for _ in range(3)
        )
    )
    chat.start()
    refused(attacked.post(CHAT, messages=MESSAGES, chat_template=template))
    chat.join()
    assert [c.status_code for c in chats] == [200] * 3
    assert len({c.json()["choices"][0]["message"]["content"] for c in chats}) == 1


def test_messages_are_no_templates_and_variables_no_attributes(attacked):
    for text in ("{{ 7 * 7 }}", "{% raw %}", "\x00\r\n<|im_start|>{{", "\u202e"):
        told = attacked.post(
            TOKENIZE,
            messages=[{"role": text, "content": text, "name": text}],
            chat_template="{{ messages[0].content }}|{{ messages[0].role }}",
        ).json()
        assert attacked.post(DETOKENIZE, tokens=told["tokens"]).json()["prompt"] == f"{text}|{text}"
    for name in ("messages", "self", "tools", "add_generation_prompt"):
        param = refused(attacked.post(CHAT, messages=MESSAGES, chat_template="x", chat_template_kwargs={name: 1}))
        assert param == "chat_template_kwargs"


@pytest.mark.parametrize("depth", [100, 600, 940])
def test_nested_messages_and_variables(attacked, depth):
    nested = b"[" * depth + b"]" * depth
    for body in (
        b'{"messages":[{"role":"user","content":"a","x":%s}],"max_tokens":1}' % nested,
        b'{"messages":[{"role":"user","content":"a"}],"chat_template":"{{ x }}",'
        b'"chat_template_kwargs":{"x":%s},"max_tokens":1}' % nested,
    ):
        answer = attacked.client.post(CHAT, content=body)
        assert answer.status_code == 200 or refused(answer) == "messages"


# ---- work off the loop -----------------------------------------------------------------------------------------


def test_small_requests_overtake_a_large_one(attacked):
    done = []
    large = threading.Thread(
        target=lambda: done.append(attacked.post(COMPLETIONS, prompt="word " * 1_500_000).status_code)
    )
    large.start()
    for _ in range(20):
        done.append(attacked.post(COMPLETIONS, prompt="a", max_tokens=1).status_code)
    large.join()
    assert done == [200] * 20 + [400]
