"""Clients that nobody here wrote, as strict as they can be made, on a real socket."""

from __future__ import annotations

import asyncio
import gc
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asyncengine.server import create_app
from tests.server.serving import KEY, MODEL, USER, Later, listening, scripted_engine, settled, until

openai = Later("openai")

pytestmark = pytest.mark.loops("either")


@asynccontextmanager
async def clients(answer: str = "Hello there", **config: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
    engine = scripted_engine(answer, **config)
    async with engine, listening(create_app(engine, api_key=KEY)) as url:
        options = {"base_url": f"{url}/v1", "api_key": KEY, "max_retries": 0, "_strict_response_validation": True}
        async with openai.AsyncOpenAI(**options) as client:
            yield client, options, engine
        gc.collect()


async def test_openai_chat() -> None:
    async with clients() as (client, _, _):
        found = await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=1)
        assert found.choices[0].message.content == "Hello there" and found.usage.completion_tokens == 12
        texts = []
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
        ):
            texts += [choice.delta.content or "" for choice in chunk.choices]
        assert "".join(texts) == "Hello there" and chunk.usage.total_tokens == 23 + 12
        async with client.chat.completions.stream(model=MODEL, messages=USER) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "Hello there"


async def test_openai_completions_and_models() -> None:
    async with clients() as (client, options, _):
        found = await client.completions.create(model=MODEL, prompt=["a", "b"], logprobs=1, echo=False, n=2)
        assert [choice.text for choice in found.choices] == ["Hello there"] * 4
        # Not strictly: in a stream, OpenAI's own reason is null where the client's type has no null.
        async with openai.AsyncOpenAI(**options | {"_strict_response_validation": False}) as lenient:
            chunks = [c async for c in await lenient.completions.create(model=MODEL, prompt="a", stream=True)]
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "Hello there"
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_openai_errors() -> None:
    async with clients() as (client, options, engine):
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=MODEL, messages=USER, temperature=-1)
        assert bad.value.param == "temperature" and bad.value.request_id
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
        async with openai.AsyncOpenAI(**options | {"api_key": "wrong"}) as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        await engine.debug_call_func_on_all_workers("fail_next", RuntimeError("boom"))
        with pytest.raises(openai.APIError, match="step"):
            async for _ in await client.chat.completions.create(model=MODEL, messages=USER, stream=True):
                pass
        await engine.unload()
        with pytest.raises(openai.InternalServerError) as unloaded:
            await client.chat.completions.create(model=MODEL, messages=USER)
        assert unloaded.value.status_code == 503


async def test_openai_synchronous() -> None:
    async with clients() as (_, options, _):

        def ask() -> tuple[str, str]:
            with openai.OpenAI(**options) as client:
                whole = client.chat.completions.create(model=MODEL, messages=USER).choices[0].message.content
                chunks = client.chat.completions.create(model=MODEL, messages=USER, stream=True)
                return whole, "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

        assert await asyncio.to_thread(ask) == ("Hello there", "Hello there")


@pytest.mark.loops("each")
async def test_openai_leaving_a_stream_ends_the_request() -> None:
    async with clients("x" * 3000, step_seconds=0.001) as (client, _, engine):
        async with await client.chat.completions.create(model=MODEL, messages=USER, stream=True) as stream:
            async for _ in stream:
                break
        await settled(engine)
        async with asyncio.timeout(5):
            await until(lambda: bool(engine.metrics().counters.requests["abort"]))


@pytest.mark.loops("each")
async def test_curl() -> None:
    async with clients() as (_, options, _):
        program = [
            "curl", "-sS", "-N", "--noproxy", "*", f"{options['base_url']}/completions",
            "-H", f"authorization: Bearer {KEY}", "--json", '{"prompt": "a", "stream": true}',
        ]  # fmt: skip
        try:
            done = await asyncio.to_thread(subprocess.run, program, capture_output=True, text=True, timeout=30)
        except FileNotFoundError:
            pytest.skip("there is no curl")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith('data: {"id":"cmpl-') and done.stdout.endswith("data: [DONE]\n\n")
