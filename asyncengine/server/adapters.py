"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, as vLLM calls them. There where the admin routes are."""

from __future__ import annotations

from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.errors import AdapterError
from asyncengine.server.refusal import Refusal
from asyncengine.server.service import Service, reply
from asyncengine.server.wire import Body

Text = Annotated[str, msgspec.Meta(min_length=1)]


class LoadAdapterBody(msgspec.Struct, kw_only=True):
    """What is loaded: a directory on the server's machine, under a name that clients give as ``model``."""

    lora_name: Text
    lora_path: Text
    load_inplace: bool = False


class UnloadAdapterBody(msgspec.Struct, kw_only=True):
    """What is let go."""

    lora_name: Text


LOAD = Body(
    LoadAdapterBody,
    refused={"is_3d_lora_weight": "experts are not adapted"},
    harmless={"is_3d_lora_weight": (False,)},
)
UNLOAD = Body(UnloadAdapterBody, ignored=frozenset({"lora_int_id"}))


def routes(service: Service) -> list[Route]:
    """The routes; none unless the settings want the admin routes."""
    if not service.settings.admin:
        return []
    engine = service.engine
    under_way: set[str] = set()

    async def load(request: Request) -> Response:
        body, headers = await service.read(request, LOAD)
        name = body.lora_name
        if name == service.check_serving(None).name:
            message = f"lora_name is {name!r}, which is what the model itself is called; choose another name"
            raise Refusal(400, message, "invalid_field", "lora_name")
        if not body.load_inplace and (name in engine.adapters or name in under_way):
            message = f"lora_name is {name!r}, which is loaded already; with load_inplace it would be replaced"
            raise Refusal(400, message, "invalid_field", "lora_name")
        under_way.add(name)
        try:
            await engine.load_adapter(name, body.lora_path)
        except AdapterError as error:
            refusal = service.refusal(error)
            refusal.param = "lora_path"
            raise refusal from error
        finally:
            under_way.discard(name)
        return reply({"adapters": engine.adapters}, headers=headers)

    async def unload(request: Request) -> Response:
        body, headers = await service.read(request, UNLOAD)
        name = body.lora_name
        if not await engine.unload_adapter(name):
            there = ", ".join(map(repr, engine.adapters)) or "none"
            raise Refusal(404, f"lora_name is {name!r}; loaded: {there}", "model_not_found", "lora_name")
        return reply({"adapters": engine.adapters}, headers=headers)

    return [
        Route("/v1/load_lora_adapter", load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
    ]
