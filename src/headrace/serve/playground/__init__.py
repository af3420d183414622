"""The playground: one page at `/`, a client of the public API that also shows what the engine is doing.

The page is a few static files: no build step, no other host, no inline script. Its live data comes from
`/playground/live`, which needs the API key if there is one; the files need none.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse

from headrace.serve.gateway import Gateway
from headrace.serve.live import Live

__all__ = ["PUBLIC_PATHS", "playground_router"]

WATCHERS = 16
"""Streams of live data at a time, at most."""
MEDIA_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = (
    "index.html",
    "style.css",
    "panel.css",
    "icon.svg",
    "theme.js",
    "app.js",
    "api.js",
    "settings.js",
    "transcript.js",
    "tokens.js",
    "live.js",
    "charts.js",
    "tree.js",
)
PUBLIC_PATHS = frozenset({"/", *(f"/playground/{name}" for name in FILES if name != "index.html")})
"""Paths that need no key: static files without the server's data."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def playground_router(gateway: Gateway, model_name: str) -> APIRouter:
    """`/`, the files of the page, and `/playground/live` as server-sent events, one JSON object a frame."""
    router = APIRouter(include_in_schema=False)
    live = Live(gateway, model_name)
    folder = resources.files(__name__)
    for name in FILES:
        path = "/" if name == "index.html" else f"/playground/{name}"
        content = (folder / name).read_bytes()
        router.add_api_route(path, _reader(content, MEDIA_TYPES[name.rpartition(".")[2]]), methods=["GET"])

    async def watch() -> Response:
        if live.watchers >= WATCHERS:
            message = f"{WATCHERS} pages watch already: close one"
            error = {"message": message, "type": "server_error", "param": None, "code": 503}
            return JSONResponse({"error": error}, 503, {"Retry-After": "10"})
        return StreamingResponse(
            _events(live),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    router.add_api_route("/playground/live", watch, methods=["GET"])
    return router


def _reader(content: bytes, media_type: str):  # type: ignore[no-untyped-def]
    async def read() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return read


async def _events(live: Live) -> AsyncIterator[bytes]:
    async for frame in live.frames():
        yield f"data: {json.dumps(frame, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
