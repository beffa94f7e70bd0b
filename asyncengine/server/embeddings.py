"""``/v1/embeddings``."""

from __future__ import annotations

import base64
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.outputs import Embedding, Pooling
from asyncengine.server.prompts import prompts_of
from asyncengine.server.reading import CUT, ReadingBody, ReadingUsage, check_count, found, options_of
from asyncengine.server.service import Service, reply
from asyncengine.server.wire import Body

_NAMES = {
    "prompt": "input",
    "prompts": "input",
    **{name: name for name in ("pooling", "normalize", "dimensions", "prompt_name", CUT)},
}


class EmbeddingsBody(ReadingBody, kw_only=True):
    """What the route takes."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    pooling: str | None = None
    normalize: bool = True
    prompt_name: str | None = None


class EmbeddingItem(msgspec.Struct):
    """One text's vector: numbers, or the base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class Embeddings(msgspec.Struct):
    """The answer."""

    data: list[EmbeddingItem]
    model: str
    usage: ReadingUsage
    object: str = "list"


BODY = Body(
    EmbeddingsBody,
    ignored=frozenset({"user"}),
    refused={"messages": "use input"},
)


def routes(service: Service) -> list[Route]:
    """The route."""

    async def create(request: Request) -> Response:
        request.state.names = _NAMES
        body, headers = await service.read(request, BODY)
        served = service.check_serving(body.model)
        inputs = prompts_of(body.input, "input")
        check_count(len(inputs), "input")
        options = options_of(body, "embd", request, served)
        asked: dict[str, Any] = {"normalize": body.normalize, "dimensions": body.dimensions, "options": options}
        asked |= {"prompt_name": body.prompt_name, CUT: body.truncate_prompt_tokens}
        pooling: Pooling | None = body.pooling  # type: ignore[assignment]  # the engine checks it
        read = await found(service, request, service.engine.embed(inputs, pooling, **asked))
        if read is None:
            return Response(status_code=499)
        tokens = sum(embedding.usage.prompt_tokens for embedding in read)
        items = [_item(index, embedding, body.encoding_format) for index, embedding in enumerate(read)]
        return reply(Embeddings(items, served.name, ReadingUsage(tokens, tokens)), headers=headers)

    return [Route("/v1/embeddings", create, methods=["POST"])]


def _item(index: int, embedding: Embedding, encoding: str) -> EmbeddingItem:
    vector = embedding.vector
    if encoding == "base64":
        return EmbeddingItem(index, base64.b64encode(vector.astype("<f4").tobytes()).decode())
    return EmbeddingItem(index, vector.tolist())
