"""`Guard`: what every request passes before anything reads it: the key, and the size and pace of its body.

A body that is refused is still read and thrown away, within bounds, because many clients read no answer before they
have sent all of theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.serve.http import JSON, error_body

__all__ = ["Guard"]

MIB = 1 << 20
BODY_SECONDS = 60.0
"""A body that takes longer is given up."""
DRAIN_BYTES, DRAIN_SECONDS = 64 * MIB, 10.0
"""Of a refused body that are thrown away at most."""
HELD_BYTES = 256 * MIB
"""Of bodies that are held in memory at once, all requests together."""


class _BodyError(Exception):
    """The body is refused: the status and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """An ASGI application around another: it gives it whole bodies only."""

    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int, api_keys: Collection[str] = (), public: Collection[str] = ()
    ) -> None:
        """Requests need one of `api_keys`, where there are any, except for the `public` paths."""
        self._app = app
        self._most = max_body_bytes
        self._keys = [key.encode() for key in api_keys]
        self._public = frozenset(public)
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on with its body, or answer for it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._admitted(scope["path"], headers):
            message = "this server asks for a key: send the header Authorization: Bearer KEY"
            await _turn_away(scope, receive, send, 401, message, {"WWW-Authenticate": "Bearer"})
            return
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            await _turn_away(scope, receive, send, 415, "compressed bodies are not read: send it plain")
            return
        body = bytearray()
        try:
            if not await self._read(headers, receive, body):
                await self._app(scope, _replay(bytes(body), receive), send)
        except _BodyError as error:
            retry = {"Retry-After": "1"} if error.status == 503 else {}
            await _turn_away(scope, receive, send, error.status, str(error), retry)
        finally:
            self._held -= len(body)

    def _admitted(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if not self._keys or path in self._public:
            return True
        kind, _, sent = headers.get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(sent.strip(), key) for key in self._keys]
        return kind.lower() == b"bearer" and any(matches)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive, body: bytearray) -> bool:
        """Read into `body`; returns whether the client left meanwhile."""
        said = headers.get(b"content-length", b"")
        self._check(int(said) if said.isdigit() else 0)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return True
                    part = message.get("body", b"")
                    body += part
                    self._held += len(part)
                    self._check(len(body))
                    more = message.get("more_body", False)
        except TimeoutError:
            raise _BodyError(408, f"the body took longer than {BODY_SECONDS:g} s") from None
        return False

    def _check(self, size: int) -> None:
        if size > self._most:
            raise _BodyError(413, f"the body is larger than {self._most / MIB:g} MiB, this server's --max-body-mib")
        if size and self._held > HELD_BYTES:
            raise _BodyError(503, "too many large requests at once: try again later")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and after it what the client does."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _turn_away(
    scope: Scope, receive: Receive, send: Send, status: int, message: str, headers: dict[str, str] | None = None
) -> None:
    """Answer, once the client has sent its body, or enough of it."""
    size, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while more and size < DRAIN_BYTES:
                part = await receive()
                if part["type"] == "http.disconnect":
                    return
                size, more = size + len(part.get("body", b"")), part.get("more_body", False)
    # What was not read stands in the connection's way: no other request can follow.
    close = {"Connection": "close"} if more else {}
    await JSON(error_body(status, message), status, {**(headers or {}), **close})(scope, receive, send)
