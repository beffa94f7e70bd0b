"""What the routes have in common that read something off prompts: embeddings, classes, scores."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import msgspec
from starlette.requests import Request

from asyncengine.errors import RequestDroppedError
from asyncengine.loop.prepare import RequestOptions
from asyncengine.server.answer import new_id
from asyncengine.server.naming import Served
from asyncengine.server.refusal import Refusal
from asyncengine.server.sampling import DeadlineFields, deadlines_of
from asyncengine.server.service import Service
from asyncengine.server.sse import unless_gone

T = TypeVar("T")

MAX_INPUTS = 2048
"""OpenAI's."""
CUT = "truncate_prompt_tokens"
"""vLLM's name of how long a prompt may be before its end is left out."""


class ReadingBody(msgspec.Struct, kw_only=True):
    """Who reads, and how the request is handled."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    deadlines: DeadlineFields | None = None


class ReadingUsage(msgspec.Struct):
    """What it cost."""

    prompt_tokens: int
    total_tokens: int


def options_of(body: ReadingBody, prefix: str, request: Request, served: Served) -> RequestOptions:
    """How the requests are handled; their ids begin like the answer's."""
    return RequestOptions(
        request_id=new_id(prefix),
        label=request.state.request_id,
        priority=body.priority,
        deadlines=deadlines_of(body.deadlines),
        when_full="raise",
        adapter=served.adapter,
    )


def check_count(count: int, field: str) -> None:
    """Refuses more inputs than one request may have.

    Raises:
        Refusal: As it says.
    """
    if count > MAX_INPUTS:
        message = f"{field} has {count} entries; allowed: at most {MAX_INPUTS}"
        raise Refusal(400, message, "invalid_field", field)


async def found(service: Service, request: Request, reading: Awaitable[T]) -> T | None:
    """What was read; None if the client has gone.

    Raises:
        Refusal: A request was aborted meanwhile.
    """
    try:
        return await unless_gone(request.receive, reading)
    except RequestDroppedError as error:
        retry = {"retry-after": str(service.settings.retry_after_seconds)}
        raise Refusal(503, str(error), "request_aborted", None, retry) from error
