"""``/v1/embeddings``."""

from __future__ import annotations

import base64
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.errors import RequestDroppedError
from asyncengine.instructions import Deadlines
from asyncengine.loop.prepare import RequestOptions
from asyncengine.outputs import Embedding, Pooling
from asyncengine.server.answer import new_id
from asyncengine.server.prompts import prompts_of
from asyncengine.server.refusal import Refusal
from asyncengine.server.sampling import DeadlineFields
from asyncengine.server.service import Service, reply
from asyncengine.server.sse import unless_gone
from asyncengine.server.wire import Body

_NAMES = {"prompt": "input", "prompts": "input", **{name: name for name in ("pooling", "normalize", "dimensions")}}
MAX_INPUTS = 2048
"""OpenAI's."""


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """What the route takes."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    pooling: str | None = None
    normalize: bool = True
    priority: int = 0
    deadlines: DeadlineFields | None = None


class EmbeddingItem(msgspec.Struct):
    """One text's vector: numbers, or the base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """What it cost."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    """The answer."""

    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


BODY = Body(
    EmbeddingsBody,
    ignored=frozenset({"user"}),
    refused={"truncate_prompt_tokens": "input that is too long is refused, not cut", "messages": "use input"},
)


def routes(service: Service) -> list[Route]:
    """The route."""

    async def create(request: Request) -> Response:
        request.state.names = _NAMES
        body, headers = await service.read(request, BODY)
        served = service.check_serving(body.model)
        inputs = prompts_of(body.input, "input")
        if len(inputs) > MAX_INPUTS:
            message = f"input has {len(inputs)} entries; allowed: at most {MAX_INPUTS}"
            raise Refusal(400, message, "invalid_field", "input")
        limits = body.deadlines
        options = RequestOptions(
            request_id=new_id("embd"),
            label=request.state.request_id,
            priority=body.priority,
            deadlines=None if limits is None else Deadlines(**msgspec.structs.asdict(limits)),
            when_full="raise",
            adapter=served.adapter,
        )
        asked: dict[str, Any] = {"normalize": body.normalize, "dimensions": body.dimensions, "options": options}
        pooling: Pooling | None = body.pooling  # type: ignore[assignment]  # the engine checks it
        try:
            found = await unless_gone(request.receive, service.engine.embed(inputs, pooling, **asked))
        except RequestDroppedError as error:
            retry = {"retry-after": str(service.settings.retry_after_seconds)}
            raise Refusal(503, str(error), "request_aborted", None, retry) from error
        if found is None:
            return Response(status_code=499)
        tokens = sum(embedding.usage.prompt_tokens for embedding in found)
        items = [_item(index, embedding, body.encoding_format) for index, embedding in enumerate(found)]
        return reply(Embeddings(items, served.name, EmbeddingUsage(tokens, tokens)), headers=headers)

    return [Route("/v1/embeddings", create, methods=["POST"])]


def _item(index: int, embedding: Embedding, encoding: str) -> EmbeddingItem:
    vector = embedding.vector
    if encoding == "base64":
        return EmbeddingItem(index, base64.b64encode(vector.astype("<f4").tobytes()).decode())
    return EmbeddingItem(index, vector.tolist())
