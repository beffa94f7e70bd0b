"""``/classify``: vLLM's, for models with a classification head."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.loop.embedding import ClassificationOptions
from asyncengine.outputs import Classification
from asyncengine.server.answer import now
from asyncengine.server.conversation import conversation, template_arguments
from asyncengine.server.prompts import prompts_of
from asyncengine.server.reading import CUT, ReadingBody, ReadingUsage, check_count, found, options_of
from asyncengine.server.refusal import Refusal
from asyncengine.server.service import Service, reply
from asyncengine.server.wire import Body

_NAMES = {"prompt": "input", "prompts": "input", CUT: CUT}


class ClassifyBody(ReadingBody, kw_only=True):
    """What the route takes: texts or token ids, or one conversation."""

    input: str | list[str | int | list[int]] | None = None
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    use_activation: bool = True


class ClassifyItem(msgspec.Struct):
    """What the head says of one prompt: probabilities, or its logits where it has none or they are asked for."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classes(msgspec.Struct):
    """The answer."""

    id: str
    created: int
    model: str
    data: list[ClassifyItem]
    usage: ReadingUsage
    object: str = "list"


BODY = Body(
    ClassifyBody,
    ignored=frozenset({"user"}),
    refused={"add_special_tokens": "a prompt gets the special tokens that its model expects"},
    harmless={"add_special_tokens": (True,)},
)


def routes(service: Service) -> list[Route]:
    """The route."""

    async def create(request: Request) -> Response:
        request.state.names = _NAMES
        body, headers = await service.read(request, BODY)
        served = service.check_serving(body.model)
        if (body.input is None) == (body.messages is None):
            raise Refusal(400, "expected either input or messages", "invalid_field", "input")
        arguments: dict[str, Any] = {}
        if body.messages is None:
            if body.chat_template_kwargs or body.add_generation_prompt:
                name = "chat_template_kwargs" if body.chat_template_kwargs else "add_generation_prompt"
                raise Refusal(400, f"{name} is for messages; input has no chat template", "invalid_field", name)
            prompts: list[Any] = list(prompts_of("" if body.input is None else body.input, "input"))
            check_count(len(prompts), "input")
        else:
            request.state.names = {**dict.fromkeys(_NAMES, "messages"), CUT: CUT}
            arguments = template_arguments(body.chat_template_kwargs)
            arguments["add_generation_prompt"] = body.add_generation_prompt
            prompts = [conversation(body.messages, service.settings.media)]
        options = options_of(body, "classify", request, served)
        arguments[CUT] = body.truncate_prompt_tokens

        async def classified() -> list[Classification]:
            given = prompts
            if body.messages is not None:
                given = [await service.with_media(prompts[0], None, options, ClassificationOptions())]
            return await service.engine.classify(given, options, **arguments)

        read = await found(service, request, classified())
        if read is None:
            return Response(status_code=499)
        tokens = sum(each.usage.prompt_tokens for each in read)
        items = [_item(index, each, body.use_activation) for index, each in enumerate(read)]
        assert options.request_id is not None
        usage = ReadingUsage(tokens, tokens)
        return reply(Classes(options.request_id, now(), served.name, items, usage), headers=headers)

    return [Route("/classify", create, methods=["POST"])]


def _item(index: int, found: Classification, use_activation: bool) -> ClassifyItem:
    numbers = found.probs if use_activation and found.probs is not None else found.logits
    return ClassifyItem(index, found.label, numbers.tolist(), len(found.labels))
