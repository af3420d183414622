"""/update_weights."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from headrace.serve.errors import NotAllowedError
from headrace.serve.http import JSON, unless_gone
from headrace.serve.models import ModelDirectory
from headrace.serve.protocol.bodies import Reader
from headrace.serve.protocol.document import UPDATED, responses
from headrace.serve.protocol.fields import UPDATE

__all__ = ["weights_router"]

HELP = (
    "Answered when they are in. Requests that run go on under them; nothing that was cached before is used again. "
    "An error says that nothing has changed."
)


def weights_router(models: ModelDirectory, allowed: bool) -> APIRouter:
    """The endpoint that replaces the weights of the running engine."""
    router = APIRouter(tags=["weights"])
    reader = Reader(UPDATE, "UpdateWeightsRequest")

    @router.post(
        UPDATE,
        openapi_extra={"requestBody": reader.schema()},
        summary="Put in the weights of a folder",
        description=HELP,
        responses=responses(UPDATED, 400, 403),
    )
    async def update_weights(request: Request) -> Response:
        if not allowed:
            raise NotAllowedError(
                "weights are read from this server's disk, which it was not told to allow: start it "
                "with --allow-weight-updates"
            )
        body = reader.read(await request.body())
        version = await unless_gone(request, models.default.gateway.update_weights(body["path"], body.get("version")))
        return JSON({"weights_version": version})

    return router
