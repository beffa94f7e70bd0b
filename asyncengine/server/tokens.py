"""``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.server.conversation import conversation, template_arguments
from asyncengine.server.media_data import told_apart
from asyncengine.server.refusal import Refusal
from asyncengine.server.service import Service, reply
from asyncengine.server.sse import unless_gone
from asyncengine.server.token_text import token_text
from asyncengine.server.wire import Body


class TokenizeBody(msgspec.Struct, kw_only=True):
    """What ``/tokenize`` takes: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """What ``/detokenize`` takes."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool = False


TOKENIZE = Body(
    TokenizeBody,
    refused={"add_special_tokens": "a prompt gets the special tokens that its model expects"},
    harmless={"add_special_tokens": (True,)},
)
DETOKENIZE = Body(DetokenizeBody)


def routes(service: Service) -> list[Route]:
    """The routes."""

    async def tokenize(request: Request) -> Response:
        body, headers = await service.read(request, TOKENIZE)
        service.check_serving(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Refusal(400, "expected either prompt or messages", "invalid_field", "prompt")
        tokenizer = service.tokenizer()
        if body.messages is None:
            try:
                ids = await anyio.to_thread.run_sync(tokenizer.encode, body.prompt or "", abandon_on_cancel=True)
            except Exception as error:
                raise Refusal(400, f"prompt cannot be encoded: {error}", "invalid_field", "prompt") from error
        else:
            request.state.names = {"prompt": "messages"}
            arguments = template_arguments(body.chat_template_kwargs)
            if body.tools:
                arguments["tools"] = body.tools
            if not body.add_generation_prompt:
                arguments["add_generation_prompt"] = False
            messages = conversation(body.messages, service.settings.media)

            async def tokenized() -> list[int]:
                given = await service.with_media(messages)
                with told_apart(messages):
                    return await service.engine.tokenize_chat(given, **arguments)

            found = await unless_gone(request.receive, tokenized())
            if found is None:
                return Response(status_code=499)
            ids = found
        config = service.engine.complete_engine_config
        answer: dict[str, Any] = {"count": len(ids), "tokens": ids}
        answer["max_model_len"] = None if config is None else config.max_single_sequence_length
        if body.return_token_strs:
            answer["token_strs"] = [token_text(tokenizer, token_id)[0] for token_id in ids]
        return reply(answer, headers=headers)

    async def detokenize(request: Request) -> Response:
        body, headers = await service.read(request, DETOKENIZE)
        service.check_serving(body.model)
        tokenizer = service.tokenizer()
        most = service.engine.vocab_size - 1
        for index, token_id in enumerate(body.tokens):
            if not 0 <= token_id <= most:
                message = f"tokens[{index}] is {token_id}; allowed: 0..{most}"
                raise Refusal(400, message, "invalid_field", f"tokens[{index}]")
        try:
            text = tokenizer.decode(body.tokens, body.skip_special_tokens)
        except Exception as error:
            raise Refusal(400, f"tokens cannot be decoded: {error}", "invalid_field", "tokens") from error
        return reply({"prompt": text}, headers=headers)

    return [Route("/tokenize", tokenize, methods=["POST"]), Route("/detokenize", detokenize, methods=["POST"])]
