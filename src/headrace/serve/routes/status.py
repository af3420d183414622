"""/v1/models, /health, /ping, /version and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from headrace import __version__
from headrace.serve.http import JSON
from headrace.serve.metrics import CONTENT_TYPE, ServerMetrics
from headrace.serve.models import ModelDirectory, ServedModel
from headrace.serve.protocol.document import CARD, HEALTH, MODELS, UNHEALTHY, VERSION, responses, text_responses

__all__ = ["PUBLIC_PATHS", "status_router"]

PUBLIC_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", "/openapi.json"})
"""Paths for monitoring that need no key: no prompt and no text is in their responses."""
NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def status_router(directory: ModelDirectory, server_metrics: ServerMetrics) -> APIRouter:
    """The server's state and metrics, and the served models."""
    router = APIRouter(tags=["status"])
    _add_models(router, directory)
    _add_health(router, directory)

    @router.get("/version", summary="headrace's version", responses=responses(VERSION, public=True))
    async def version() -> Response:
        return JSON({"version": __version__})

    @router.get(
        "/metrics",
        summary="Counters and histograms in Prometheus' text format",
        responses=text_responses(),
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        return Response(server_metrics.render(), media_type=CONTENT_TYPE)

    return router


def _add_models(router: APIRouter, directory: ModelDirectory) -> None:
    @router.get("/v1/models", summary="The served model, by each of its names", responses=responses(MODELS))
    async def models() -> Response:
        return JSON({"object": "list", "data": [_card(name, directory.find(name)) for name in directory]})

    # With `name` as an argument, FastAPI would document a 422, which is never sent.
    @router.get(
        "/v1/models/{name:path}",
        summary="One model",
        responses=responses(CARD, 404),
        openapi_extra={"parameters": [NAME]},
    )
    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        return JSON(_card(name, directory.find(name)))


def _add_health(router: APIRouter, directory: ModelDirectory) -> None:
    healthy = responses(HEALTH, public=True)
    healthy[503]["content"] = {"application/json": {"schema": UNHEALTHY}}

    @router.get("/health", summary="200 while the engine can serve, 503 while it cannot", responses=healthy)
    async def health() -> Response:
        gateway = directory.default.gateway
        state = gateway.state
        return JSON({"status": state, "restarts": gateway.restarts}, 200 if state == "ready" else 503)

    @router.api_route(
        "/ping", methods=["GET", "POST"], summary="The same, for platforms that ask so", include_in_schema=False
    )
    async def ping() -> Response:
        return await health()


def _card(name: str, model: ServedModel) -> dict[str, Any]:
    info = model.gateway.info
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "headrace",
        "root": model.name,
        "parent": None,
        "max_model_len": info.max_model_len,
        "vocab_size": info.vocab_size,
        "fingerprint": info.fingerprint,
        "weights_version": model.gateway.weights_version,
        "chat_template": model.text.tokenizer.has_chat_template,
        "default_sampling_params": dict(model.defaults),
    }
