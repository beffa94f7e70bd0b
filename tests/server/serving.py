"""Engines behind their HTTP layer: in process for most tests, on a real socket where the socket matters."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from asyncengine import AsyncEngine
from asyncengine.server import create_app
from asyncengine.testing import echo_engine, scripted_engine

MODEL = "scripted"
USER = [{"role": "user", "content": "hello"}]
KEY = "a-key-of-the-test"
AUTH = {"authorization": f"Bearer {KEY}"}


class Later:
    """A client's package, imported when it is used first: whoever only collects tests need not wait for that."""

    def __init__(self, name: str) -> None:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith(("_", "pytest")):  # pytest looks whether it is a test
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def client_of(app: ASGIApp, **arguments: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://test", **arguments)


@asynccontextmanager
async def served(engine: AsyncEngine | None = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an engine that is loaded, without a socket. Streams come whole."""
    async with engine or echo_engine() as entered:
        async with client_of(create_app(entered, **settings)) as client:
            yield client


@asynccontextmanager
async def listening(app: ASGIApp, **config: Any) -> AsyncIterator[str]:
    """The address of an application on a socket of its own."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none", **config)
    )
    serving = asyncio.ensure_future(server.serve())
    await until(lambda: server.started or serving.done())
    assert not serving.done(), serving
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


def chat(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def completion(prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **fields}


def events(text: str) -> list[Any]:
    """The payloads of a stream, which ends as it should."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]", blocks[-1]
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def error(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, in OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"} and found["message"]
    result: dict[str, Any] = found
    return result


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop run until something is so."""
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)  # threads that something is waited for need the interpreter, too


async def settled(engine: AsyncEngine) -> None:
    """Returns once nothing is left of any request."""
    async with asyncio.timeout(10):
        while (now := engine.metrics()).num_requests_running or now.num_requests_waiting or now.kv_blocks_used:
            await engine.abort_request("nobody")  # comes back after the next step


__all__ = [
    "AUTH", "KEY", "MODEL", "USER", "chat", "client_of", "completion", "echo_engine", "error", "events", "listening",
    "scripted_engine", "served", "settled", "until",
]  # fmt: skip
