"""`Guard`: keys, and limits on the size and duration of bodies."""

import asyncio

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from headrace.serve import guard
from headrace.serve.guard import Guard

MIB = 1 << 20


async def echo(scope, receive, send):
    body = await Request(scope, receive).body()
    await PlainTextResponse(f"{len(body)}")(scope, receive, send)


class Call:
    """One ASGI request: the parts of a body as they come, and the answer's messages."""

    def __init__(self, app, parts, headers=(), path="/v1/completions"):
        self.taken = 0
        self.sent = []
        self._parts = list(parts)
        self._app = app
        self._scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers), "query_string": b""}

    async def run(self):
        await self._app(self._scope, self._receive, self._send)
        return self

    async def _receive(self):
        if not self._parts:
            return {"type": "http.disconnect"}
        part = self._parts.pop(0)
        if isinstance(part, asyncio.Event):
            await part.wait()
            return await self._receive()
        self.taken += len(part)
        return {"type": "http.request", "body": part, "more_body": bool(self._parts)}

    async def _send(self, message):
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self):
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}


def call(parts, headers=(), path="/v1/completions", **settings):
    app = Guard(echo, **{"max_body_bytes": MIB, **settings})
    done = asyncio.run(Call(app, parts, headers, path).run())
    assert app._held == 0
    return done


def test_a_body_in_pieces_comes_whole():
    assert call([b"a" * 1000] * 5).sent[1]["body"] == b"5000"
    assert call([b""]).sent[1]["body"] == b"0"


def test_a_body_that_is_too_large_is_read_before_it_is_refused():
    done = call([b"a" * MIB] * 9)
    assert done.status == 413 and done.taken == 9 * MIB and "connection" not in done.headers
    said = [(b"content-length", str(3 * MIB).encode())]
    assert call([b"a" * MIB] * 3, said).status == 413
    endless = call([b"a" * MIB] * 200)
    assert endless.status == 413 and endless.taken <= 66 * MIB and endless.headers["connection"] == "close"


def test_a_body_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(guard, "DRAIN_SECONDS", 0.05)

    async def scenario():
        app = Guard(echo, max_body_bytes=MIB)
        done = await Call(app, [b"a", asyncio.Event(), b"b"]).run()
        assert done.status == 408 and app._held == 0

    asyncio.run(scenario())


def test_a_client_that_leaves_gets_no_answer():
    app = Guard(echo, max_body_bytes=MIB)

    class Leaves(Call):
        async def _receive(self):
            message = await super()._receive()
            return {**message, "more_body": True} if message["type"] == "http.request" else message

    done = asyncio.run(Leaves(app, [b"a"]).run())
    assert done.sent == [] and app._held == 0


def test_too_many_large_bodies_at_once_are_asked_to_come_again(monkeypatch):
    monkeypatch.setattr(guard, "HELD_BYTES", 1000)
    done = call([b"a" * 600, b"a" * 600, b"a"])
    assert done.status == 503 and done.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer one", 200),
        (b"bearer two", 200),
        (b"Bearer  one ", 200),
        (b"Bearer three", 401),
        (b"Bearer", 401),
        (b"Basic one", 401),
        (b"one", 401),
        (b"\xff", 401),
        (None, 401),
    ],
)
def test_keys(header, status):
    headers = [] if header is None else [(b"authorization", header)]
    done = call([b"a"], headers, api_keys=("one", "two"))
    assert done.status == status and done.taken == 1
    if status == 401:
        assert done.headers["www-authenticate"] == "Bearer"


def test_public_paths_need_no_key():
    assert call([b""], path="/health", api_keys=("one",), public={"/health"}).status == 200
    assert call([b""], path="/health/", api_keys=("one",), public={"/health"}).status == 401


def test_compressed_bodies_are_refused_by_name():
    assert call([b"a"], [(b"content-encoding", b"gzip")]).status == 415
