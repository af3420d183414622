"""`create_app`: the endpoints over the served models, as one ASGI application.

Edge (id, path) ──> CORS ──> Guard (key, body) ──> routes/ ──> protocol/ (fields, requests, forms)
                ──> Answers ──> Gateway
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from headrace import __version__
from headrace.errors import HeadraceError
from headrace.serve.edge import REQUEST_ID, Edge
from headrace.serve.errors import QueueFullError, UnavailableError
from headrace.serve.guard import MIB, Guard
from headrace.serve.http import JSON, ClientGoneError, error_body, error_response
from headrace.serve.metrics import ServerMetrics
from headrace.serve.models import ModelDirectory
from headrace.serve.playground import PUBLIC_PATHS as PAGE
from headrace.serve.playground import playground_router
from headrace.serve.routes.generation import generation_router
from headrace.serve.routes.status import PUBLIC_PATHS, status_router
from headrace.serve.routes.texts import texts_router
from headrace.serve.routes.weights import weights_router
from headrace.serve.settings import ServeSettings

__all__ = ["create_app"]

CLIENT_CLOSED = 499
"""Status for logs and tests: the client has disconnected."""


def create_app(models: ModelDirectory, metrics: ServerMetrics, settings: ServeSettings) -> ASGIApp:
    """The application. It neither starts nor stops the models."""
    app = FastAPI(
        title="headrace",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        description="An OpenAI-compatible server with the same bits whatever the load.",
    )
    for router in (
        generation_router(models),
        texts_router(models),
        weights_router(models, settings.allow_weight_updates),
        status_router(models, metrics),
        playground_router(models.default.gateway, models.default.name),
    ):
        app.include_router(router)

    async def refuse(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        not_served = f"{request.method} {request.scope['path'][:100]} is not served here"  # `url` reads the Host header
        message = not_served if error.status_code in (404, 405) else str(error.detail)
        headers = dict(error.headers or {})
        if "Allow" in headers:
            headers["Allow"] = headers["Allow"].replace("GET", "GET, HEAD")
        return JSON(error_body(error.status_code, message), error.status_code, headers)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    for kind in (HeadraceError, QueueFullError, UnavailableError, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(ClientGoneError, gone)
    guarded = Guard(
        app, max_body_bytes=int(settings.max_body_mib * MIB), api_keys=settings.api_key, public=PUBLIC_PATHS | PAGE
    )
    return Edge(_shared(guarded, settings))


def _shared(app: ASGIApp, settings: ServeSettings) -> ASGIApp:
    """The application for pages of the allowed origins. Preflights are answered before the key is asked for."""
    if not settings.allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=settings.allowed_origins,
        allow_methods=settings.allowed_methods,
        allow_headers=settings.allowed_headers,
        allow_credentials=settings.allow_credentials,
        allow_private_network=True,  # a page on the internet may ask a server on this machine: its origin is allowed
        expose_headers=(REQUEST_ID, "Retry-After"),
    )
