"""``/openapi.json``: the routes as an OpenAPI document, made from the same structs that read and write them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine._version import __version__
from asyncengine.server import (
    adapters,
    admin,
    chat,
    classify,
    completions,
    embeddings,
    messages,
    rerank,
    responses,
    tokens,
    transcriptions,
)
from asyncengine.server.chunks import ChatCompletion, Completion
from asyncengine.server.service import Service, reply
from asyncengine.server.wire import Body

_REF = "#/components/schemas/{name}"
_STREAM = "text/event-stream"


class ErrorDetails(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    """Every answer that is not a success."""

    type: str
    error: ErrorDetails


@dataclass(frozen=True)
class _Operation:
    method: str
    path: str
    summary: str
    body: Body[Any] | None = None
    answer: type | None = None
    kind: str = "application/json"
    file: str | None = None
    streams: bool = False


_OPERATIONS = (
    _Operation("get", "/health", "Whether the engine is alive."),
    _Operation("get", "/ready", "Whether requests are answered just now."),
    _Operation("get", "/metrics", "Metrics for Prometheus.", kind="text/plain"),
    _Operation("get", "/v1/models", "The model that is served, and its adapters."),
    _Operation("get", "/v1/models/{model}", "The model that is served, or one of its adapters, by its name."),
    _Operation("post", "/v1/chat/completions", "The assistant's next turn.", chat.BODY, ChatCompletion, streams=True),
    _Operation("post", "/v1/completions", "What follows a text.", completions.BODY, Completion, streams=True),
    _Operation(
        "post",
        "/v1/audio/transcriptions",
        "What is said in a file.",
        transcriptions.BODY,
        transcriptions.Transcription,
        file="file",
    ),
    _Operation(
        "post",
        "/v1/audio/translations",
        "The same in English.",
        transcriptions.TRANSLATION,
        transcriptions.Transcription,
        file="file",
    ),
    _Operation("post", "/v1/embeddings", "Texts as vectors.", embeddings.BODY, embeddings.Embeddings),
    _Operation("post", "/classify", "What a classification head says of texts.", classify.BODY, classify.Classes),
    _Operation("post", "/score", "How far texts answer others.", rerank.SCORE, rerank.Scores),
    _Operation("post", "/v1/score", "The same.", rerank.SCORE, rerank.Scores),
    _Operation("post", "/rerank", "Documents by how far they answer a query.", rerank.RERANK, rerank.Ranking),
    _Operation("post", "/v1/rerank", "The same.", rerank.RERANK, rerank.Ranking),
    _Operation("post", "/v2/rerank", "The same.", rerank.RERANK, rerank.Ranking),
    _Operation("post", "/v1/responses", "OpenAI's newer form of a turn.", responses.BODY, streams=True),
    _Operation("post", "/v1/messages", "Anthropic's form of a turn.", messages.BODY, streams=True),
    _Operation("post", "/v1/messages/count_tokens", "Tokens of a conversation.", messages.COUNT),
    _Operation("post", "/tokenize", "Tokens of a prompt or of a conversation.", tokens.TOKENIZE),
    _Operation("post", "/detokenize", "Text of tokens.", tokens.DETOKENIZE),
)
_ADMIN = (
    _Operation("post", "/admin/reload", "Loads another model.", admin.RELOAD, streams=True),
    _Operation("post", "/admin/unload", "Lets the model go.", admin.NOTHING),
    _Operation("post", "/admin/reset", "Ends all requests, empties the prefix cache.", admin.NOTHING),
    _Operation("post", "/admin/abort", "Ends a request.", admin.ABORT),
    _Operation("post", "/admin/trace", "Starts, stops or clears the trace.", admin.TRACE),
    _Operation("get", "/admin/trace", "The trace, in Chrome's format."),
    _Operation("post", "/v1/load_lora_adapter", "Loads an adapter beside the model.", adapters.LOAD),
    _Operation("post", "/v1/unload_lora_adapter", "Lets an adapter go.", adapters.UNLOAD),
)


@functools.cache  # it takes some 15 ms, and is the same for all
def document(with_admin: bool, with_key: bool) -> dict[str, Any]:
    """The OpenAPI document, not to be changed."""
    operations = _OPERATIONS + (_ADMIN if with_admin else ())
    bodies = [operation.body for operation in operations if operation.body is not None]
    answers = [operation.answer for operation in operations if operation.answer is not None]
    shapes = [body.shape for body in bodies]
    _, schemas = msgspec.json.schema_components([*dict.fromkeys(shapes), *answers, Error], ref_template=_REF)
    for body in bodies:
        schema = schemas[body.shape.__name__]
        schema["additionalProperties"] = False  # an unknown field is refused
        for name in body.ignored:
            schema["properties"][name] = {"description": "Changes nothing here; the response says so."}
        required = schema.get("required", [])
        for name, field in schema["properties"].items():
            if name not in required and "description" not in field:  # null is as good as absent
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    for operation in operations:
        if operation.file is not None and operation.body is not None:
            form = schemas[operation.body.shape.__name__]
            form["properties"][operation.file] = {"type": "string", "format": "binary"}
            form["required"] = [*form.get("required", []), operation.file]
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, with_key)
    components: dict[str, Any] = {"schemas": schemas}
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "asyncengine", "version": __version__},
        "paths": paths,
        "components": components,
    }


def routes(service: Service) -> list[Route]:
    """The route."""
    found = document(service.settings.admin, service.settings.api_key is not None)

    async def openapi(request: Request) -> Response:
        return reply({**found, "servers": [{"url": request.scope.get("root_path") or "/"}]})

    return [Route("/openapi.json", openapi)]


def _operation(operation: _Operation, with_key: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {} if operation.answer is None else {"$ref": _REF.format(name=operation.answer.__name__)}
    content: dict[str, Any] = {operation.kind: {"schema": answer}}
    if operation.streams:
        content[_STREAM] = {"schema": {"type": "object"}}  # of an event
    failure = {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}
    found: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "Why there is none.", "content": failure},
        },
    }
    if operation.path == "/health":  # says how it is even where it is not well
        found["responses"]["503"] = {"description": "Not well.", "content": {"application/json": {"schema": {}}}}
    if operation.body is not None:
        schema = {"$ref": _REF.format(name=operation.body.shape.__name__)}
        asked: dict[str, Any] = {"application/json": {"schema": schema}}
        if operation.file is not None:
            asked = {"multipart/form-data": {"schema": schema}}
        found["requestBody"] = {"required": True, "content": asked}
    if "{model}" in operation.path:
        found["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if with_key and operation.path != "/health":
        found["security"] = [{"key": []}]
    return found
