"""What the engine is and how it is: ``/health``, ``/ready``, ``/metrics``, ``/v1/models``."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.loop.engine import AsyncEngine
from asyncengine.server.naming import Served
from asyncengine.server.service import Service, reply
from asyncengine.state import EngineState


def routes(service: Service) -> list[Route]:
    """The routes."""

    async def health(request: Request) -> Response:
        found = service.engine.health()
        warm = found.warm_up
        value = {
            "ok": found.ok,
            "state": found.state.value,
            "problems": found.problems,
            "notes": found.notes,
            "warm_up": {"done": warm.done, "of": warm.of, "goes_on": warm.goes_on},
        }
        return reply(value, 200 if found.ok and found.state is not EngineState.CLOSED else 503)

    async def ready(request: Request) -> Response:
        found = service.engine.health()
        paused = found.state in (EngineState.PAUSED, EngineState.SLEEPING)
        if service.stage is not None or not found.admits or paused:
            service.unavailable(found)
        return reply({"ready": True, "state": found.state.value, "model": service.name})

    async def metrics(request: Request) -> Response:
        return Response(await service.traffic.text(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    async def models(request: Request) -> Response:
        if service.name is None:
            return reply({"object": "list", "data": []})
        found = [Served(service.name), *(Served(adapter, adapter) for adapter in service.adapters)]
        return reply({"object": "list", "data": [_model(service, served) for served in found]})

    async def model(request: Request) -> Response:
        return reply(_model(service, service.named(request.path_params["model"])))

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
    ]


def _model(service: Service, served: Served) -> dict[str, object]:
    config = service.engine.complete_engine_config
    length = None if config is None else config.max_single_sequence_length
    return {
        "id": served.name,
        "object": "model",
        "created": service.created,
        "owned_by": "asyncengine",
        "max_model_len": length,
        "root": service.name,
        "parent": None if served.adapter is None else service.name,
        # As OpenRouter and llama.cpp's router have it; OpenAI's list has nothing like it.
        "architecture": {
            "input_modalities": _modalities(service.engine),
            "output_modalities": ["text"],
        },
    }


def _modalities(engine: AsyncEngine) -> list[str]:
    """What may be in prompts."""
    return ["text", *["image"] * engine.takes_images, *["audio"] * engine.takes_audio, *["video"] * engine.takes_videos]
