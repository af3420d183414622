"""Clients that send slowly or never read: they are disconnected in time or waited for, and delay no other client."""

import asyncio
import contextlib
import http.client
import json
import socket

import psutil
import pytest
import uvicorn

from headrace.serve import server as serving
from headrace.serve.protocol.fields import COMPLETIONS
from headrace.serve.server import _Protocol, _Uvicorn
from serve.http_kit import PATIENCE, served, until

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone"


# ---- heads -----------------------------------------------------------------------------------------------------


class Slow:
    """An application that answers on demand, and records its calls."""

    def __init__(self):
        self.called = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.called.set()
        while (await receive()).get("more_body", False):
            pass
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"do", "more_body": True})
        await send({"type": "http.response.body", "body": b"ne", "more_body": False})


def against(scenario):
    """Run `scenario(app, connect)` beside an HTTP server of ours over a slow application."""

    async def run():
        app, listens = Slow(), asyncio.Event()
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=1,
        )
        server = _Uvicorn(config, listens.set)
        with socket.create_server(("127.0.0.1", 0)) as bound:
            running = asyncio.ensure_future(server.serve([bound]))
            await listens.wait()
            port, writers = bound.getsockname()[1], []

            async def connect(sent=b""):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writers.append(writer)
                writer.write(sent)
                return reader, writer

            try:
                async with asyncio.timeout(PATIENCE):
                    await scenario(app, connect)
            finally:
                for writer in writers:
                    writer.close()
                server.should_exit = True
                await running

    asyncio.run(run())


async def the_time_is_over(connect):
    """A head's time from now: an idle connection is closed."""
    reader, _ = await connect()
    assert await reader.read() == b""


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.2)


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost:", GET[:-2]])
@pytest.mark.parametrize("later", [False, True])
def test_a_head_that_never_comes_whole_ends_its_connection(soon, sent, later):
    async def scenario(app, connect):
        app.may_answer.set()
        reader, writer = await connect(GET if later and sent else sent)
        if later and sent:
            assert await reader.readexactly(len(ANSWER)) == ANSWER
            writer.write(sent)
        assert await reader.read() == b""
        assert app.called.is_set() == bool(later and sent)

    against(scenario)


def test_a_part_of_a_head_behind_a_request_ends_its_connection_too(soon):
    async def scenario(app, connect):
        reader, _ = await connect(GET + GET[:-2])
        await app.called.wait()
        app.may_answer.set()
        assert await reader.read() == ANSWER

    against(scenario)


def test_a_head_that_trickles_ends_all_the_same(soon):
    async def scenario(app, connect):
        reader, writer = await connect(b"GET / HTTP/1.1\r\nX: ")
        ended = asyncio.ensure_future(reader.read())
        while not ended.done():
            writer.write(b"x")
            await asyncio.wait({ended}, timeout=0.02)
        with contextlib.suppress(ConnectionResetError):  # a byte may meet a closed connection
            assert ended.result() == b""
        assert not app.called.is_set()

    against(scenario)


def test_a_slow_head_that_comes_in_time_is_served():
    async def scenario(app, connect):
        app.may_answer.set()
        reader, writer = await connect()
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for byte in GET:
                writer.write(bytes([byte]))
                turn = asyncio.Event()
                asyncio.get_running_loop().call_soon(turn.set)
                await turn.wait()  # the server has read it
            assert await reader.readexactly(len(ANSWER)) == ANSWER

    against(scenario)


@pytest.mark.parametrize("later", [False, True])
def test_an_answer_may_take_longer_than_a_head(soon, later):
    async def scenario(app, connect):
        reader, writer = await connect(GET)
        if later:
            app.may_answer.set()
            assert await reader.readexactly(len(ANSWER)) == ANSWER
            app.may_answer.clear()
            app.called.clear()
            writer.write(GET)
        await app.called.wait()
        await the_time_is_over(connect)
        app.may_answer.set()
        assert await reader.readexactly(len(ANSWER)) == ANSWER

    against(scenario)


def test_a_body_may_take_longer_than_a_head(soon):
    async def scenario(app, connect):
        app.may_answer.set()
        reader, writer = await connect(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n\r\na")
        await app.called.wait()
        for _ in range(2):
            await the_time_is_over(connect)
            writer.write(b"b")
        assert await reader.readexactly(len(ANSWER)) == ANSWER

    against(scenario)


def test_a_connection_that_is_kept_may_be_idle_for_longer(soon):
    async def scenario(app, connect):
        app.may_answer.set()
        reader, writer = await connect(GET)
        assert await reader.readexactly(len(ANSWER)) == ANSWER
        await the_time_is_over(connect)
        writer.write(GET)
        assert await reader.readexactly(len(ANSWER)) == ANSWER

    against(scenario)


# ---- clients that never read ------------------------------------------------------------------------------------

MIB = 1 << 20
CHOICES = 8
UNREAD = {
    "prompt": "Once upon a time, Mia",
    "n": CHOICES,
    "seed": 1,
    "ignore_eos": True,
    "logprobs": 20,
    "stream": True,
    "stream_options": {"continuous_usage_stats": True},
    "request_id": "x" * 256,
}
"""Large events, which fill the sockets soon."""
WHOLE = 480
"""Tokens of a choice whose stream no socket holds."""


@pytest.fixture(scope="module")
def busy(tinyworld_checkpoint):
    with served(tinyworld_checkpoint, "--served-model-name", "tiny") as running:
        yield running


def connect(server):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE)
    host, port = server.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    return connection


def never_read(server, **fields):
    """A connection that asked for a stream, and reads nothing."""
    body = json.dumps({**UNREAD, **fields}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = connect(server)
    connection.sendall(head.encode() + body)
    return connection


def generated(server):
    return server.metric("vllm:generation_tokens_total")


def at_rest(server):
    return all(
        server.metric(name) == 0
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    )


def test_a_client_that_goes_without_having_read_ends_its_request(busy):
    expected = busy.ordinary_tokens()
    before, made = busy.metric("headrace:aborts_total"), generated(busy)
    with never_read(busy, max_tokens=WHOLE):
        until(lambda: generated(busy) > made)
        assert busy.ordinary_tokens() == expected
    until(lambda: busy.metric("headrace:aborts_total") > before)
    until(lambda: at_rest(busy))
    assert busy.metric("headrace:aborts_total") - before == CHOICES
    assert busy.ordinary_tokens() == expected


def unread(server, stack, streams, length):
    """Open unread streams; returns when all their tokens are generated."""
    made = generated(server)
    opened = [stack.enter_context(never_read(server, max_tokens=length)) for _ in range(streams)]
    until(lambda: generated(server) - made >= streams * CHOICES * length and at_rest(server))
    return opened


def test_unread_streams_leak_no_memory(busy):
    expected, process, sizes = busy.ordinary_tokens(), psutil.Process(busy.process.pid), []
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            unread(busy, stack, 70, 16)
            assert busy.ordinary_tokens() == expected
        assert busy.ordinary_tokens() == expected
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 32 * MIB  # what two rounds brought is more, as objects


def test_what_no_socket_holds_waits_for_its_reader_and_is_all_there(busy):
    expected, process = busy.ordinary_tokens(), psutil.Process(busy.process.pid)
    before = process.memory_info().rss
    with contextlib.ExitStack() as stack:
        first, *_ = unread(busy, stack, 3, WHOLE)  # the engine waits for no reader, or this would not end
        assert process.memory_info().rss - before < 256 * MIB
        assert busy.ordinary_tokens() == expected
        answer = http.client.HTTPResponse(first, method="POST")
        answer.begin()
        events = answer.read().decode().removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event[6:])["choices"]]
    count = sum(len(choice["logprobs"]["tokens"]) for choice in choices)
    assert count == CHOICES * WHOLE and sum(c["finish_reason"] == "length" for c in choices) == CHOICES
    assert busy.ordinary_tokens() == expected


@pytest.mark.parametrize("sent", [b"", GET[:20]])
def test_a_thousand_idle_connections_block_no_request(busy, sent):
    expected = busy.ordinary_tokens()
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connect(busy)).sendall(sent)
        assert busy.ordinary_tokens() == expected
        with connect(busy) as fresh:
            fresh.sendall(b"GET /version HTTP/1.1\r\nHost: here\r\n\r\n")
            assert fresh.recv(12) == b"HTTP/1.1 200"
