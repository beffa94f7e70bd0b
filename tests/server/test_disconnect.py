"""A client that leaves, on a real socket: what it asked for ends within a step, and its blocks are free."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.server import create_app
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.server.serving import MODEL, chat, completion, listening, until

PATHS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", chat("x" * 300)),
    ("/v1/completions", completion("x" * 300, max_tokens=300)),
    ("/v1/completions", completion(["x" * 300, "y" * 300], max_tokens=300)),
]


def request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(content)}\r\n\r\n"
    return head.encode() + content


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(("path", "body"), PATHS, ids=["chat", "completion", "many"])
async def test_a_client_that_leaves_ends_its_request_within_a_step(
    path: str, body: dict[str, Any], stream: bool, http: str
) -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    async with AsyncEngine(EngineConfig(MODEL), loader=loader) as engine:
        app = create_app(engine)
        traffic = app.state.service.traffic
        async with listening(app, http=http) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            model = loader.model
            model.hold()
            writer.write(request(path, body | {"stream": stream}))
            for _ in range(3):
                assert await asyncio.to_thread(model.wait_until_held)
                model.let()
            if stream:
                assert b" 200 " in await reader.readline()
            assert await asyncio.to_thread(model.wait_until_held)
            assert engine.metrics().num_requests_running > 0 and traffic.active == 1
            steps = model.steps
            writer.close()
            await until(lambda: traffic.active == 0)  # the server has seen it and let go
            model.let()  # the step that was under way
            requests = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
            await until(lambda: engine.metrics().counters.requests["abort"] == requests)
            assert model.steps == steps
            now = engine.metrics()
            assert now.kv_blocks_used == 0 and now.num_requests_running == 0
            model.release()


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue() -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    async with AsyncEngine(EngineConfig(MODEL), loader=loader) as engine, listening(create_app(engine)) as url:
        await engine.pause()
        for stream in (True, False):
            _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(request("/v1/chat/completions", chat(stream=stream)))
            async with asyncio.timeout(5):
                await until(lambda: bool(engine.metrics().num_requests_waiting))
                writer.close()
                await until(lambda: not engine.metrics().num_requests_waiting)
        assert loader.model.steps == 0


async def test_silence_is_filled_with_pings() -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    async with AsyncEngine(EngineConfig(MODEL), loader=loader) as engine:
        async with listening(create_app(engine, ping_seconds=0.02)) as url:
            await engine.pause()
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(request("/v1/completions", completion("hi", stream=True)))
            seen = await asyncio.wait_for(reader.readuntil(b": ping\n\n\r\n"), 5)
            assert b"text/event-stream" in seen
            await asyncio.wait_for(reader.readuntil(b": ping\n\n\r\n"), 5)
            await engine.resume()
            rest = await asyncio.wait_for(reader.readuntil(b"data: [DONE]\n\n"), 5)
            assert b'"text":"h' in rest
            writer.close()
