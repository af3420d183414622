"""/v1/models, /health, /ping, /version and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from headrace import __version__
from headrace.serve.errors import NotFoundError
from headrace.serve.http import JSON
from headrace.serve.metrics import CONTENT_TYPE
from headrace.serve.parts import Parts

__all__ = ["PUBLIC_PATHS", "status_router"]

PUBLIC_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", "/openapi.json"})
"""What monitors read without a key; no prompt and no text is in it."""


def status_router(parts: Parts) -> APIRouter:
    """How the server is, and what it serves."""
    router = APIRouter(tags=["status"])

    def card(name: str) -> dict[str, Any]:
        info = parts.gateway.info
        return {
            "id": name, "object": "model", "created": parts.created, "owned_by": "headrace", "root": parts.model_name,
            "parent": None, "max_model_len": info.max_model_len, "fingerprint": info.fingerprint,
            "chat_template": parts.texts.tokenizer.has_chat_template,
            "default_sampling_params": dict(parts.defaults),
        }

    @router.get("/v1/models", summary="The served model, by each of its names")
    async def models() -> Response:
        return JSON({"object": "list", "data": [card(name) for name in parts.names]})

    @router.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> Response:
        if name not in parts.names:
            raise NotFoundError(parts.not_served(name), "model")
        return JSON(card(name))

    @router.get("/health", summary="200 while the engine can serve, 503 while it cannot")
    async def health() -> Response:
        state = parts.gateway.state
        return JSON({"status": state, "restarts": parts.gateway.restarts}, 200 if state == "ready" else 503)

    @router.api_route("/ping", methods=["GET", "POST"], summary="The same, for platforms that ask so",
                      include_in_schema=False)
    async def ping() -> Response:
        return await health()

    @router.get("/version", summary="headrace's version")
    async def version() -> Response:
        return JSON({"version": __version__})

    @router.get("/metrics", summary="Counters and histograms in Prometheus' text format")
    async def metrics() -> Response:
        return Response(parts.metrics.render(), media_type=CONTENT_TYPE)

    return router
