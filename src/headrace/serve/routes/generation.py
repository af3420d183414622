"""/v1/completions and /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from headrace.errors import renamed_fields
from headrace.serve.answers import Answers
from headrace.serve.conversation import read_conversation, shaped
from headrace.serve.errors import RefusedError
from headrace.serve.http import unless_gone
from headrace.serve.models import ModelDirectory, ServedModel
from headrace.serve.protocol.bodies import Body, Reader
from headrace.serve.protocol.document import CHAT_ANSWER, COMPLETION, GENERATING, responses
from headrace.serve.protocol.fields import CHAT, COMPLETIONS
from headrace.serve.protocol.forms import CHAT_FORM, COMPLETION_FORM
from headrace.serve.protocol.requests import GenerationRequest, read_generation_request
from headrace.serve.text_service import TokenizedPrompt, several

__all__ = ["generation_router", "truncated"]


def generation_router(models: ModelDirectory) -> APIRouter:
    """Endpoints that generate text."""
    router = APIRouter(tags=["generation"])
    completion, chat = Reader(COMPLETIONS, "CompletionRequest"), Reader(CHAT, "ChatCompletionRequest")

    @router.post(
        COMPLETIONS,
        openapi_extra={"requestBody": completion.schema()},
        summary="Continue prompts",
        responses=responses(COMPLETION, *GENERATING, stream=True),
    )
    async def completions(request: Request) -> Response:
        body = completion.read(await request.body())
        model = models.of(body)
        answers = Answers(model)
        generation = read_generation_request(body, COMPLETIONS, model.defaults, model.priorities)
        await _check_constraint(request, generation, model)
        answers.check(generation, len(several(body["prompt"])))
        special = body.get("add_special_tokens", True)
        prompts = await unless_gone(request, model.text.prompts("prompt", body["prompt"], special))
        return await answers.answer(request, generation, COMPLETION_FORM, [truncated(p, body, model) for p in prompts])

    @router.post(
        CHAT,
        openapi_extra={"requestBody": chat.schema()},
        summary="Answer a conversation",
        responses=responses(CHAT_ANSWER, *GENERATING, stream=True),
    )
    async def chat_completions(request: Request) -> Response:
        body = chat.read(await request.body())
        model = models.of(body)
        generation = read_generation_request(body, CHAT, model.defaults, model.priorities)
        if generation.echo and not body.get("continue_final_message", False):
            raise RefusedError("echo needs continue_final_message: true", "echo")
        conversation = await unless_gone(request, read_conversation(body, model))
        generation = shaped(generation, conversation, model.text.tokenizer)
        await _check_constraint(request, generation, model)
        echo = conversation.begun if generation.echo else None
        prompts = [truncated(conversation.prompt, body, model)]
        return await Answers(model).answer(request, generation, CHAT_FORM, prompts, echo)

    return router


async def _check_constraint(request: Request, generation: GenerationRequest, model: ServedModel) -> None:
    """Refuse a constraint that the engine could not compile, before the engine is asked to."""
    with renamed_fields(generation.names):
        await unless_gone(request, model.trials.check(generation.params))


def truncated(prompt: TokenizedPrompt, body: Body, model: ServedModel) -> TokenizedPrompt:
    """The prompt, cut as `truncate_prompt_tokens` and `truncation_side` ask."""
    count, side = body.get("truncate_prompt_tokens"), body.get("truncation_side", "left")
    most = model.gateway.info.max_model_len
    if count is None:
        if side == "right":
            raise RefusedError("truncation_side: right needs truncate_prompt_tokens", "truncation_side")
        return prompt
    if count > most:
        reason = f"truncate_prompt_tokens={count} is more than the context of {most} tokens"
        raise RefusedError(reason, "truncate_prompt_tokens")
    # With -1, one place is left for a token to be generated.
    return prompt.cut(most - 1 if count < 0 else count, side == "right")
