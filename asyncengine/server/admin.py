"""Routes for whoever runs the engine: reload, unload, reset, abort, trace. Off unless asked for, behind the API key."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.config import EngineConfig
from asyncengine.errors import AdapterError, AsyncEngineError, CheckpointError, ConfigError
from asyncengine.server.naming import check_names
from asyncengine.server.refusal import Refusal
from asyncengine.server.service import Service, reply
from asyncengine.server.sse import EventStream, named
from asyncengine.server.wire import Body

_BAD_KEY = re.compile(r"(?:unknown configuration key|the configuration has no) '(\w+)'")
_FIRST_WORD = re.compile(rf"({'|'.join(field.name for field in dataclasses.fields(EngineConfig))})\b")


_LOOK_SECONDS = 0.05
"""How often a load is looked at while somebody watches it."""


class ReloadBody(msgspec.Struct, kw_only=True):
    """What ``/admin/reload`` takes: fields of the engine's configuration, and what happens to requests.

    Unless told otherwise nobody notices: the present model serves to the end what comes until the next one is ready.
    """

    config: dict[str, Any]
    in_flight: Literal["abort", "wait", "carry"] = "wait"
    new_requests: Literal["wait", "serve"] = "serve"
    stream: bool = True


class AbortBody(msgspec.Struct, kw_only=True):
    """What ``/admin/abort`` takes: the id of a response."""

    request_id: str


class TraceBody(msgspec.Struct, kw_only=True):
    """What ``/admin/trace`` takes."""

    action: Literal["start", "stop", "clear"]


class NothingBody(msgspec.Struct, kw_only=True):
    """An empty object: what says that nobody was tricked into sending this."""


RELOAD, ABORT, TRACE, NOTHING = Body(ReloadBody), Body(AbortBody), Body(TraceBody), Body(NothingBody)


def routes(service: Service) -> list[Route]:
    """The routes; none unless the settings want them."""
    if not service.settings.admin:
        return []
    engine = service.engine
    loads: set[asyncio.Task[EngineConfig]] = set()

    async def reload(request: Request) -> Response:
        body, headers = await service.read(request, RELOAD)
        try:
            config = EngineConfig.from_dict(body.config)
            check_names(config, service.settings)
        except TypeError as error:
            raise Refusal(400, f"config: {error}", "invalid_field", "config") from error
        except ConfigError as error:
            raise _refusal(service, error, body.config) from error
        load = asyncio.ensure_future(engine.reload(config, body.in_flight, body.new_requests))
        loads.add(load)  # goes on when the client leaves
        load.add_done_callback(loads.discard)
        load.add_done_callback(_retrieve)
        if body.stream:
            return EventStream(_progress(service, load, body.config), headers, service.settings.ping_seconds)
        try:
            complete = await asyncio.shield(load)
        except AsyncEngineError as error:
            raise _refusal(service, error, body.config) from error
        return reply({"config": msgspec.to_builtins(complete)}, headers=headers)

    async def unload(request: Request) -> Response:
        await service.read(request, NOTHING)
        await engine.unload()
        return reply({"state": engine.state.value})

    async def reset(request: Request) -> Response:
        await service.read(request, NOTHING)
        await engine.reset()
        return reply({"state": engine.state.value})

    async def abort(request: Request) -> Response:
        body, _ = await service.read(request, ABORT)
        await engine.abort_request(body.request_id)
        return reply({"request_id": body.request_id})

    async def change_trace(request: Request) -> Response:
        body, _ = await service.read(request, TRACE)
        {"start": engine.trace.start, "stop": engine.trace.stop, "clear": engine.trace.clear}[body.action]()
        return reply({"enabled": engine.trace.enabled, "events": len(engine.trace)})

    async def read_trace(request: Request) -> Response:
        text = await anyio.to_thread.run_sync(engine.trace.to_json)
        return Response(text, media_type="application/json")

    return [
        Route("/admin/reload", reload, methods=["POST"]),
        Route("/admin/unload", unload, methods=["POST"]),
        Route("/admin/reset", reset, methods=["POST"]),
        Route("/admin/abort", abort, methods=["POST"]),
        Route("/admin/trace", change_trace, methods=["POST"]),
        Route("/admin/trace", read_trace, methods=["GET"]),
    ]


def _retrieve(load: asyncio.Task[EngineConfig]) -> None:
    if not load.cancelled():
        load.exception()  # whoever watched has been told


def _refusal(service: Service, error: Exception, given: dict[str, Any]) -> Refusal:
    """What a client is told, with the field of the configuration it has given that is at fault."""
    refusal, field = service.refusal(error), None
    if isinstance(error, ConfigError):  # which begins with it
        found = _BAD_KEY.match(refusal.message) or _FIRST_WORD.match(refusal.message)
        field = found[1] if found else None
    elif isinstance(error, CheckpointError):  # which quotes what is not there
        named = {name: [given[name]] for name in ("model", "tokenizer") if given.get(name) is not None}
        named["additional_models"] = list(given.get("additional_models") or ())
        quoting = (name for name, values in named.items() if any(repr(value) in refusal.message for value in values))
        field = next(quoting, None)
    elif isinstance(error, AdapterError):
        field = "adapters"
    if field is not None:
        refusal.param = f"config.{field}"
    return refusal


async def _progress(
    service: Service, load: asyncio.Task[EngineConfig], given: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    """What the load is doing, whenever that changes; then how it ended."""
    begun, last = time.perf_counter(), None
    while not load.done():
        health = service.engine.health()
        now = (health.state.value, health.loading)
        if now != last:
            last = now
            seconds = round(time.perf_counter() - begun, 3)
            yield named("progress", {"state": now[0], "doing": now[1], "seconds": seconds})
        await asyncio.wait([load], timeout=_LOOK_SECONDS)
    try:
        config = load.result()
    except Exception as error:
        yield named("error", _refusal(service, error, given).payload())
    else:
        service.problem = None
        seconds = round(time.perf_counter() - begun, 3)
        yield named("done", {"config": msgspec.to_builtins(config), "seconds": seconds})
