"""`create_app`: the ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from asyncengine.loop.engine import AsyncEngine
from asyncengine.server import (
    adapters,
    admin,
    chat,
    classify,
    completions,
    embeddings,
    messages,
    openapi,
    page,
    probes,
    rerank,
    responses,
    tokens,
    transcriptions,
)
from asyncengine.server.gate import Gate
from asyncengine.server.refusal import Refusal
from asyncengine.server.service import Service
from asyncengine.server.settings import ServerSettings
from asyncengine.server.wire import IGNORED_HEADER


def create_app(
    engine: AsyncEngine, settings: ServerSettings | None = None, *, own_engine: bool = False, **fields: Any
) -> Starlette:
    """An ASGI application that serves an engine; run it, or mount it in another one.

    Args:
        engine: The engine. Who made it loads it and shuts it down, before, during or after.
        settings: How it is served; None is `ServerSettings` of `fields`.
        own_engine: Whether the application's lifespan enters and leaves the engine. A mounted application has no
            lifespan of its own.
        **fields: Fields of `ServerSettings`, instead of `settings`.

    Raises:
        ConfigError: A setting is wrong.
    """
    if settings is None:
        settings = ServerSettings(**fields)
    elif fields:
        raise TypeError(f"settings and {', '.join(fields)} are both given; expected one of them")
    return _application(Service(engine, settings), own_engine)


def _application(service: Service, own_engine: bool = False) -> Starlette:
    settings = service.settings
    middleware = [Middleware(Gate, engine=service.engine, settings=settings, traffic=service.traffic)]
    if settings.cors_origins:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", IGNORED_HEADER, "retry-after"],
            ),
        )
    readings = [embeddings, classify, rerank, transcriptions]
    modules = [probes, tokens, completions, chat, *readings, responses, messages, admin, adapters, page, openapi]
    app = Starlette(
        routes=[route for module in modules for route in module.routes(service)],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
        lifespan=_lifespan(service.engine) if own_engine else None,
    )
    app.state.service = service
    return app


def _lifespan(engine: AsyncEngine) -> Any:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        entered: AbstractAsyncContextManager[Any] = engine
        async with entered:
            yield

    return lifespan


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses: a path or a method that is not there."""
    assert isinstance(error, HTTPException)
    words = {404: f"there is no {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    message = words.get(error.status_code, error.detail)
    return Refusal(error.status_code, message, None, None, error.headers).response()
