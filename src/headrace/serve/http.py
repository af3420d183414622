"""HTTP responses: JSON, server-sent events, errors in OpenAI's shape, and client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.errors import HeadraceError, RequestError
from headrace.serve.errors import NotAllowedError, NotFoundError, QueueFullError, UnavailableError

__all__ = ["JSON", "ClientGoneError", "EventStream", "error_body", "error_response", "unless_gone"]

RETRY = "5"
"""Value of Retry-After, in seconds, while no engine is available."""
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
CODES = {
    401: "invalid_api_key",
    404: "unknown_url",
    405: "method_not_supported",
    429: "rate_limit_exceeded",
}
"""OpenAI's codes for statuses; other statuses have none."""
WRONG_VALUE = "invalid_value"
"""Of a field's error without a code of its own."""
LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
"""Characters that many clients treat as line ends, though the format does not, and their JSON escapes."""
_encoder = msgspec.json.Encoder()
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has disconnected."""


class JSON(Response):
    """A JSON response. Floats have the shortest form that parses to the same bits."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encoder.encode(content)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape. Without a `code` it has that of the status, if there is one."""
    kind = TYPES.get(status, "server_error")
    message = message.encode(errors="replace").decode()  # a chat template's error text may contain surrogates
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def error_response(error: Exception) -> JSON:
    """The response for an error of a route, the gateway or an engine."""
    headers: dict[str, str] = {}
    status, param, code = 500, None, None
    if isinstance(error, RequestError):
        param, code = error.param, error.code
    if isinstance(error, NotAllowedError):
        status = 403
    elif isinstance(error, NotFoundError):
        status = 404
    elif isinstance(error, HeadraceError):
        status, code = 400, code or (WRONG_VALUE if param else None)
    elif isinstance(error, QueueFullError):
        status, headers = 429, {"Retry-After": str(error.retry_after)}
    elif isinstance(error, UnavailableError):
        status, headers = 503, {"Retry-After": RETRY}
    message = str(error) if status != 500 else "the server failed: its log says why"
    return JSON(error_body(status, message, param, code), status, headers)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client disconnects first, cancels it and raises `ClientGoneError`.

    The request's body must have been read: the only message that can still come is the disconnect.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, one JSON object each. `close` is called at the end, or when the client disconnects.

    The source yields lists of objects, which are sent together. If it raises, the last event is the error, without
    `[DONE]`.
    """

    def __init__(self, source: AsyncIterator[list[Mapping[str, Any]]], close: Callable[[], None]) -> None:
        self._source = source
        self._close = close
        self.status_code = 200
        self.background = None
        self.init_headers(
            {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or stop when the client disconnects."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            done = sending.done()
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            self._close()
        if done and not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for events in self._source:
                await send({"type": "http.response.body", "body": _frames(events), "more_body": True})
            last = b"data: [DONE]\n\n"
        except (HeadraceError, QueueFullError, UnavailableError) as error:
            last = b"data: " + error_response(error).body + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _frames(events: list[Mapping[str, Any]]) -> bytes:
    data = b"".join([b"data: %b\n\n" % _encoder.encode(event) for event in events])
    for raw, escaped in LINE_ENDS:
        data = data.replace(raw, escaped)
    return data
