"""`Guard`: checks the API key, and the kind, size and duration of request bodies, before any route runs.

A refused body is still read and discarded, up to a limit, because many clients read the answer only after they have
sent the whole body.
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
"""Limit for receiving a body: 408 after it."""
DRAIN_BYTES, DRAIN_SECONDS = 64 * MIB, 10.0
"""Limits for reading and discarding a refused body."""
HELD_BYTES = 256 * MIB
"""Limit for bodies in memory, all requests together: 503 beyond it."""


class _BodyError(Exception):
    """The body is refused. `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """An ASGI middleware: the application behind it gets complete bodies only."""

    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int, api_keys: Collection[str] = (), public: Collection[str] = ()
    ) -> None:
        """Requests need one of `api_keys`, if there are any, except for the `public` paths."""
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._keys = [key.encode() for key in api_keys]
        self._public = frozenset(public)
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body, or reject it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._authorized(scope["path"], headers):
            message = "this server asks for a key: send the header Authorization: Bearer KEY"
            await _reject(scope, receive, send, 401, message, {"WWW-Authenticate": "Bearer"})
            return
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            await _reject(scope, receive, send, 415, "compressed bodies are not read: send it plain")
            return
        if scope["method"] == "POST" and scope["path"] not in self._public and not _is_intended(headers):
            message = "a request from a web page needs the header Content-Type: application/json"
            await _reject(scope, receive, send, 415, message)
            return
        body = bytearray()
        try:
            if not await self._read(headers, receive, body):
                await self._app(scope, _replay(bytes(body), receive), send)
        except _BodyError as error:
            retry = {"Retry-After": "1"} if error.status == 503 else {}
            await _reject(scope, receive, send, error.status, str(error), retry)
        finally:
            self._held -= len(body)

    def _authorized(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if not self._keys or path in self._public:
            return True
        kind, _, sent = headers.get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(sent.strip(), key) for key in self._keys]
        return kind.lower() == b"bearer" and any(matches)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive, body: bytearray) -> bool:
        """Read into `body`; returns whether the client disconnected."""
        length = headers.get(b"content-length", b"")
        self._check(int(length) if length.isdigit() else 0)
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
        if size > self._max_body_bytes:
            raise _BodyError(
                413, f"the body is larger than {self._max_body_bytes / MIB:g} MiB, this server's --max-body-mib"
            )
        if size and self._held > HELD_BYTES:
            raise _BodyError(503, "too many large requests at once: try again later")


def _is_intended(headers: dict[bytes, bytes]) -> bool:
    """Whether no web page of another origin can have sent this unasked: JSON needs a preflight, forms and text do not.

    Only browsers send `Origin`; other clients may send any type.
    """
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    return b"origin" not in headers or kind == b"application/json"


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body once, then what the client sends."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _reject(
    scope: Scope, receive: Receive, send: Send, status: int, message: str, headers: dict[str, str] | None = None
) -> None:
    """Answer after the client has sent its body, or as much as is read of a refused one."""
    size, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while more and size < DRAIN_BYTES:
                part = await receive()
                if part["type"] == "http.disconnect":
                    return
                size, more = size + len(part.get("body", b"")), part.get("more_body", False)
    # The unread rest of the body blocks the connection for further requests.
    close = {"Connection": "close"} if more else {}
    await JSON(error_body(status, message), status, {**(headers or {}), **close})(scope, receive, send)
