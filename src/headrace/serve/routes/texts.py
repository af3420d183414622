"""/v1/embeddings, /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

from fastapi import APIRouter, Request, Response

from headrace.instance.wire import Embedding
from headrace.serve.errors import RefusedError
from headrace.serve.http import JSON, unless_gone
from headrace.serve.parts import Parts
from headrace.serve.protocol.bodies import Reader
from headrace.serve.protocol.document import DETOKENIZED, EMBEDDED, GENERATING, TOKENIZED, WITH_MODEL
from headrace.serve.protocol.document import answers as documented
from headrace.serve.protocol.fields import DETOKENIZE, EMBEDDINGS, TOKENIZE
from headrace.serve.routes.generation import read_chat, truncated
from headrace.serve.texts import Prompt, several

__all__ = ["texts_router"]

EMBEDDING_HELP = (
    "The mean over a text's tokens of the served model's last hidden states, fp32 and not normalised. "
    "A model that was trained to generate gives embeddings of modest worth for search."
)


def texts_router(parts: Parts) -> APIRouter:
    """What has to do with texts, and generates none."""
    router = APIRouter(tags=["texts"])
    embedding = Reader(EMBEDDINGS, "EmbeddingRequest")
    tokenizing, detokenizing = Reader(TOKENIZE, "TokenizeRequest"), Reader(DETOKENIZE, "DetokenizeRequest")

    @router.post(
        EMBEDDINGS,
        openapi_extra={"requestBody": embedding.schema()},
        summary="Mean-pooled hidden states",
        description=EMBEDDING_HELP,
        responses=documented(EMBEDDED, *GENERATING),
    )
    async def embeddings(request: Request) -> Response:
        body = embedding.read(await request.body())
        parts.check_model(body)
        given = several(body["input"])
        if len(given) > parts.gateway.seats:
            raise RefusedError(
                f"{len(given)} texts at once, and this server holds {parts.gateway.seats}: send fewer", "input"
            )
        prompts = await unless_gone(request, parts.texts.prompts(given, body.get("add_special_tokens", True)))
        prompts = [truncated(prompt, body, parts) for prompt in prompts]
        made = await unless_gone(request, _embed(parts, prompts))
        as_base64 = body.get("encoding_format") == "base64"
        count = sum(len(prompt.token_ids) for prompt in prompts)
        return JSON(
            {
                "object": "list",
                "model": parts.model_name,
                "weights_version": made[-1].weights_version,
                "data": [
                    {"object": "embedding", "index": i, "embedding": _packed(e.vector) if as_base64 else e.vector}
                    for i, e in enumerate(made)
                ],
                "usage": {"prompt_tokens": count, "total_tokens": count},
            }
        )

    @router.post(
        TOKENIZE,
        openapi_extra={"requestBody": tokenizing.schema()},
        summary="Text to token ids",
        responses=documented(TOKENIZED, *WITH_MODEL),
    )
    async def tokenize(request: Request) -> Response:
        body = tokenizing.read(await request.body())
        parts.check_model(body)
        if ("prompt" in body) == ("messages" in body):
            raise RefusedError("send prompt or messages, one of them", "prompt")
        if "messages" in body:
            prompt = await unless_gone(request, read_chat(body, parts))
        else:
            [prompt] = await unless_gone(
                request, parts.texts.prompts([body["prompt"]], body.get("add_special_tokens", True))
            )
        answer: dict[str, Any] = {
            "count": len(prompt.token_ids),
            "max_model_len": parts.gateway.info.max_model_len,
            "tokens": prompt.token_ids,
        }
        if body.get("return_token_strs", False):
            answer["token_strs"] = await parts.texts.token_texts(prompt.token_ids)
        return JSON(answer)

    @router.post(
        DETOKENIZE,
        openapi_extra={"requestBody": detokenizing.schema()},
        summary="Token ids to text",
        responses=documented(DETOKENIZED, *WITH_MODEL),
    )
    async def detokenize(request: Request) -> Response:
        body = detokenizing.read(await request.body())
        parts.check_model(body)
        last = parts.gateway.info.vocab_size - 1
        for token in body["tokens"]:
            if token > last:
                raise RefusedError(f"tokens has id {token}, and the vocabulary ends at {last}", "tokens")
        return JSON({"prompt": await parts.texts.decode(body["tokens"])})

    return router


async def _embed(parts: Parts, prompts: list[Prompt]) -> list[Embedding]:
    """All of them, or the first error. They are made one after another."""
    tasks = [asyncio.ensure_future(parts.gateway.embed("embedding", prompt.token_ids)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
