from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from asyncengine import AsyncEngine, ConfigError, EngineConfig
from asyncengine.server import create_app
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.server.serving import AUTH, KEY, MODEL, chat, client_of, completion, echo_engine, error, served, until

pytestmark = pytest.mark.loops("either")


@asynccontextmanager
async def administered() -> AsyncIterator[tuple[httpx.AsyncClient, AsyncEngine, ScriptedLoader]]:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    async with AsyncEngine(EngineConfig(MODEL), loader=loader) as engine:
        async with client_of(create_app(engine, api_key=KEY, admin=True), headers=AUTH) as client:
            yield client, engine, loader


def named_events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.split("\n\n"):
        if block:
            name, _, payload = block.partition("\n")
            found.append((name.removeprefix("event: "), json.loads(payload.removeprefix("data: "))))
    return found


async def test_there_are_no_admin_routes_unless_they_are_asked_for() -> None:
    async with served(api_key=KEY) as client:
        for route in ("reload", "unload", "reset", "abort", "trace"):
            assert (await client.post(f"/admin/{route}", json={}, headers=AUTH)).status_code == 404


async def test_admin_routes_ask_for_the_key_and_for_json() -> None:
    async with administered() as (client, engine, _):
        refused = await client.post("/admin/unload", json={}, headers={"authorization": "Bearer wrong"})
        assert refused.status_code == 401
        form = await client.post("/admin/unload", data={"a": "b"})
        assert form.status_code == 415
        assert engine.state.value == "ready"


async def test_a_reload_tells_of_its_progress() -> None:
    async with administered() as (client, engine, loader):
        loader.gate = threading.Event()
        body = {"config": {"model": "other", "max_num_sequence": 3}}
        call = asyncio.ensure_future(client.post("/admin/reload", json=body))
        await until(lambda: engine.state.value == "loading")
        assert (await client.post("/v1/completions", json=completion())).status_code == 200  # by the present model
        assert (await client.get("/ready")).status_code == 200
        await asyncio.sleep(0.06)  # so that the load is seen to be under way
        loader.gate.set()
        found = named_events((await call).text)
        assert [name for name, _ in found][-1] == "done" and ("progress") in [name for name, _ in found]
        assert any(payload["state"] == "loading" for name, payload in found if name == "progress")
        assert found[-1][1]["config"]["max_num_sequence"] == 3
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "other"


async def test_a_reload_may_have_new_requests_wait() -> None:
    async with administered() as (client, engine, loader):
        loader.gate = threading.Event()
        body = {"config": {"model": "other"}, "new_requests": "wait", "stream": False}
        call = asyncio.ensure_future(client.post("/admin/reload", json=body))
        await until(lambda: engine.state.value == "loading")
        refused = await client.post("/v1/completions", json=completion())
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert (await client.get("/ready")).status_code == 503
        loader.gate.set()
        assert (await call).status_code == 200


async def test_a_reload_that_fails_says_why_and_the_old_model_serves() -> None:
    async with administered() as (client, _, loader):
        loader.load_errors["broken"] = RuntimeError("the disk is gone")
        streamed = named_events((await client.post("/admin/reload", json={"config": {"model": "broken"}})).text)
        assert streamed[-1][0] == "error" and streamed[-1][1]["error"]["code"] == "reload"
        whole = await client.post("/admin/reload", json={"config": {"model": "broken"}, "stream": False})
        assert whole.status_code == 422 and error(whole)["code"] == "reload"
        assert (await client.post("/v1/completions", json=completion())).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "config"),
        ({"config": {}}, "config.model"),
        ({"config": {"model": "a", "colour": 1}}, "config.colour"),
        ({"config": {"model": "a", "max_num_sequence": 0}}, "config.max_num_sequence"),
        ({"config": {"model": 3}}, "config.model"),
        ({"config": {"model": "a"}, "in_flight": "maybe"}, "in_flight"),
        ({"config": {"model": "a"}, "new_requests": "drop"}, "new_requests"),
    ],
)
async def test_a_wrong_configuration_is_refused_before_anything_happens(body: dict[str, Any], param: str) -> None:
    async with administered() as (client, _, loader):
        refused = await client.post("/admin/reload", json=body)
        assert refused.status_code == 400 and param.rpartition(".")[2] in error(refused)["message"]
        assert error(refused)["param"] == param
        assert len(loader.models) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_field_that_does_not_fit_the_model_is_named(stream: bool) -> None:
    async with administered() as (client, _, loader):
        loader.check_errors["other"] = ConfigError("max_single_sequence_length is 9; the model's allows 1..8")
        answer = await client.post("/admin/reload", json={"config": {"model": "other"}, "stream": stream})
        found = named_events(answer.text)[-1][1]["error"] if stream else error(answer)
        assert found["param"] == "config.max_single_sequence_length"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"model": "./nowhere"}, "config.model"),
        ({"model": "tiny", "tokenizer": "./nowhere"}, "config.tokenizer"),
        (
            {"model": "tiny", "speculative_mode": "small_draft", "additional_models": ["./nowhere"]},
            "config.additional_models",
        ),
    ],
)
async def test_a_model_that_is_not_there_is_named(given: dict[str, Any], param: str) -> None:
    async with AsyncEngine() as engine, client_of(create_app(engine, api_key=KEY, admin=True), headers=AUTH) as client:
        refused = await client.post("/admin/reload", json={"config": given, "stream": False})
        assert refused.status_code == 422 and error(refused)["param"] == param
        assert error(refused)["message"] == "model './nowhere': there is no such directory"


async def test_a_load_without_a_present_model_is_beside_none() -> None:
    async with administered() as (client, engine, loader):
        await client.post("/admin/unload", json={})
        loader.gate = threading.Event()
        call = asyncio.ensure_future(client.post("/admin/reload", json={"config": {"model": "other"}}))
        await until(lambda: engine.health().loading not in (None, "checking"))
        assert engine.health().loading == "loading"
        loader.gate.set()
        assert named_events((await call).text)[-1][0] == "done"


async def test_answers_go_on_across_a_reload_that_carries_them() -> None:
    async with administered() as (client, _, loader):
        loader.model.hold()
        call = asyncio.ensure_future(client.post("/v1/chat/completions", json=chat("carried")))
        await asyncio.to_thread(loader.model.wait_until_held)
        body = {"config": {"model": "other"}, "in_flight": "carry", "stream": False}
        reload = asyncio.ensure_future(client.post("/admin/reload", json=body))
        loader.model.release()
        assert (await reload).status_code == 200
        answer = (await call).json()
        assert answer["choices"][0]["message"]["content"] == "user: carried\nassistant: "


async def test_unload_reset_and_abort() -> None:
    async with administered() as (client, engine, _):
        await engine.pause()
        body = completion(stream=False)
        call = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await until(lambda: engine.metrics().num_requests_waiting == 1)
        assert (await client.post("/admin/reset", json={})).json() == {"state": "paused"}
        assert error(await call)["code"] == "request_aborted"
        await engine.resume()
        assert (await client.post("/admin/unload", json={})).json() == {"state": "unloaded"}
        assert (await client.get("/ready")).status_code == 503


async def test_a_response_can_be_aborted_by_its_id() -> None:
    from tests.server.serving import listening

    async with echo_engine(step_seconds=0.002) as engine:
        async with listening(create_app(engine, api_key=KEY, admin=True)) as url:
            async with httpx.AsyncClient(base_url=url, headers=AUTH, trust_env=False) as client:
                async with client.stream("POST", "/v1/chat/completions", json=chat("x" * 900, stream=True)) as stream:
                    lines = stream.aiter_lines()
                    response_id = json.loads((await anext(lines)).removeprefix("data: "))["id"]
                    assert (await client.post("/admin/abort", json={"request_id": "nobody"})).status_code == 200
                    assert (await client.post("/admin/abort", json={"request_id": response_id})).status_code == 200
                    rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"request_aborted"' in rest[-2]


async def test_a_value_that_is_not_among_those_allowed_is_told_which_are() -> None:
    async with administered() as (client, _, _):
        wrong = await client.post("/admin/trace", json={"action": "dance"})
        assert wrong.status_code == 400 and error(wrong)["param"] == "action"
        assert "'dance'; allowed: 'start', 'stop', 'clear'" in error(wrong)["message"]
        wrong = await client.post("/admin/unload", json={"x": 1})
        assert error(wrong)["message"] == "unknown field 'x'; known: none"


async def test_a_trace_is_recorded_and_read() -> None:
    async with administered() as (client, _, _):
        assert (await client.post("/admin/trace", json={"action": "start"})).json() == {"enabled": True, "events": 0}
        await client.post("/v1/completions", json=completion())
        assert (await client.post("/admin/trace", json={"action": "stop"})).json()["events"] > 0
        trace = (await client.get("/admin/trace")).json()
        assert {"step", "model"} <= {event["name"] for event in trace["traceEvents"]}
        assert (await client.post("/admin/trace", json={"action": "clear"})).json()["events"] == 0
        assert (await client.post("/admin/trace", json={"action": "begin"})).status_code == 400
