"""/v1/embeddings, /tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import time
from array import array
from typing import Any

from fastapi import APIRouter, Request, Response

from headrace.errors import renamed_fields
from headrace.instance.wire import Embedding
from headrace.serve.conversation import read_conversation
from headrace.serve.errors import RefusedError
from headrace.serve.http import JSON, unless_gone
from headrace.serve.models import ModelDirectory, ServedModel
from headrace.serve.protocol.bodies import Reader
from headrace.serve.protocol.document import (
    DETOKENIZED,
    EMBEDDED,
    GENERATING,
    TOKENIZED,
    TOKENIZER,
    WITH_MODEL,
    responses,
)
from headrace.serve.protocol.fields import DETOKENIZE, EMBEDDINGS, TOKENIZE
from headrace.serve.routes.generation import truncated
from headrace.serve.text_service import TokenizedPrompt, several

__all__ = ["texts_router"]

EMBEDDING_HELP = (
    "The mean over a text's tokens of the served model's last hidden states, fp32, scaled to length 1 unless normalize "
    "is false. A model that was trained to generate gives embeddings of modest worth for search."
)


def texts_router(models: ModelDirectory) -> APIRouter:
    """Endpoints over texts that generate none."""
    router = APIRouter(tags=["texts"])
    _add_embeddings(router, models)
    _add_tokenize(router, models)
    _add_detokenize(router, models)
    _add_tokenizer_info(router, models)
    return router


def _add_embeddings(router: APIRouter, models: ModelDirectory) -> None:
    reader = Reader(EMBEDDINGS, "EmbeddingRequest")

    @router.post(
        EMBEDDINGS,
        openapi_extra={"requestBody": reader.schema()},
        summary="Mean-pooled hidden states",
        description=EMBEDDING_HELP,
        responses=responses(EMBEDDED, *GENERATING),
    )
    async def embeddings(request: Request) -> Response:
        body = reader.read(await request.body())
        model = models.of(body)
        count = len(several(body["input"]))
        if count > model.gateway.seats:
            raise RefusedError(
                f"input has {count} texts, and this server holds {model.gateway.seats} at once: send fewer", "input"
            )
        special = body.get("add_special_tokens", True)
        prompts = await unless_gone(request, model.text.prompts("input", body["input"], special))
        prompts = [truncated(prompt, body, model) for prompt in prompts]
        made = await unless_gone(request, _embed(model, prompts))
        unit = body.get("normalize", body.get("use_activation", True))
        vectors = [_unit(one.vector) if unit else one.vector for one in made]
        as_base64 = body.get("encoding_format") == "base64"
        count = sum(len(prompt.token_ids) for prompt in prompts)
        return JSON(
            {
                "id": f"embd-{request.state.request_id}",
                "object": "list",
                "created": int(time.time()),
                "model": model.name,
                "weights_version": made[-1].weights_version,
                "data": [
                    {"object": "embedding", "index": i, "embedding": _packed(vector) if as_base64 else vector}
                    for i, vector in enumerate(vectors)
                ],
                "usage": {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count},
            }
        )


def _add_tokenize(router: APIRouter, models: ModelDirectory) -> None:
    reader = Reader(TOKENIZE, "TokenizeRequest")

    @router.post(
        TOKENIZE,
        openapi_extra={"requestBody": reader.schema()},
        summary="Text to token ids",
        responses=responses(TOKENIZED, *WITH_MODEL),
    )
    async def tokenize(request: Request) -> Response:
        body = reader.read(await request.body())
        model = models.of(body)
        if ("prompt" in body) == ("messages" in body):
            raise RefusedError("send prompt or messages, one of them", "prompt")
        if "messages" in body:
            # No call is read here, so its format need not be known.
            conversation = await unless_gone(request, read_conversation({**body, "tool_choice": "none"}, model))
            prompt = conversation.prompt
        else:
            special = body.get("add_special_tokens", True)
            [prompt] = await unless_gone(request, model.text.prompts("prompt", body["prompt"], special))
        answer: dict[str, Any] = {
            "count": len(prompt.token_ids),
            "max_model_len": model.gateway.info.max_model_len,
            "tokens": prompt.token_ids,
            "token_strs": None,
        }
        if body.get("return_token_strs", False):
            answer["token_strs"] = await asyncio.to_thread(model.text.tokenizer.pieces, prompt.token_ids)
        return JSON(answer)


def _add_detokenize(router: APIRouter, models: ModelDirectory) -> None:
    reader = Reader(DETOKENIZE, "DetokenizeRequest")

    @router.post(
        DETOKENIZE,
        openapi_extra={"requestBody": reader.schema()},
        summary="Token ids to text",
        responses=responses(DETOKENIZED, *WITH_MODEL),
    )
    async def detokenize(request: Request) -> Response:
        body = reader.read(await request.body())
        model = models.of(body)
        size = model.gateway.info.vocab_size
        for token in body["tokens"]:
            if token >= size:
                reason = f"tokens has token id {token}, which is out of vocabulary: there are {size} tokens, from 0"
                raise RefusedError(reason, "tokens")
        return JSON({"prompt": await model.text.decode(body["tokens"])})


def _add_tokenizer_info(router: APIRouter, models: ModelDirectory) -> None:
    @router.get("/tokenizer_info", summary="The tokenizer's configuration", responses=responses(TOKENIZER))
    async def tokenizer_info() -> Response:
        return JSON(models.default.text.tokenizer.info())


async def _embed(model: ServedModel, prompts: list[TokenizedPrompt]) -> list[Embedding]:
    """The embeddings of all prompts, or the first error."""

    async def one(prompt: TokenizedPrompt) -> Embedding:
        with renamed_fields({"prompt": prompt.place}):
            return await model.gateway.embed("embedding", prompt.token_ids)

    tasks = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _unit(vector: list[float]) -> list[float]:
    """The vector scaled to length 1, of fp32 numbers. One of zeros stays as it is."""
    length = math.sqrt(math.fsum(x * x for x in vector)) or 1.0
    return array("f", [x / length for x in vector]).tolist()


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
