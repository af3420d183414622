"""`Edge`: what every request and response has in common, before keys, bodies and routes.

A response carries `x-request-id`. HEAD is GET without the body. A path may end in a slash, and OpenAI's paths may
lack their /v1.
"""

from __future__ import annotations

import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["REQUEST_ID", "Edge"]

REQUEST_ID = "x-request-id"
"""The header of a request's id; `request.state.request_id` in routes."""
MAX_ID_LENGTH = 256
ALIASES = ("/chat/completions", "/completions", "/embeddings", "/models")
"""Paths that are also served without the /v1 before them, as clients with a shorter base URL ask for them."""


class Edge:
    """An ASGI middleware, the outermost one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its id, by the path and the method that are routed."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head = scope["method"] == "HEAD"
        name = _request_id(scope)
        ended = False

        async def respond(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                others = [(k, v) for k, v in message.get("headers", ()) if k.lower() != REQUEST_ID.encode()]
                message = {**message, "headers": [*others, (REQUEST_ID.encode(), name.encode())]}
            elif head and message["type"] == "http.response.body":
                if ended:
                    return
                ended, message = True, {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        inner = {
            **scope,
            "method": "GET" if head else scope["method"],
            "path": _routed(scope["path"]),
            "state": {**scope.get("state", {}), "request_id": name},
        }
        try:
            await self._app(inner, receive, respond)
        except Exception as error:
            error.add_note(f"request {name}: {scope['method']} {inner['path'][:100]}")  # in the log, by the traceback
            raise


def _request_id(scope: Scope) -> str:
    """The client's, if it is printable ASCII of a sensible length, or a new one."""
    sent: bytes = next((value for key, value in scope["headers"] if key == REQUEST_ID.encode()), b"")
    if 0 < len(sent) <= MAX_ID_LENGTH and all(0x21 <= byte <= 0x7E for byte in sent):
        return sent.decode()
    return uuid.uuid4().hex


def _routed(path: str) -> str:
    path = path.rstrip("/") or "/"
    return "/v1" + path if path in ALIASES or path.startswith("/models/") else path
