"""Adapters behind the server: as models that are asked for by name, and loaded and let go over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, RequestOptions
from asyncengine.server import create_app
from asyncengine.server.naming import Served
from asyncengine.server.service import Service
from asyncengine.step.model import LoadedModel, LoadPlan
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.model import tiny_adapters
from tests.server.serving import AUTH, KEY, MODEL, client_of, error, events, listening, served, until

pytestmark = [pytest.mark.loops("either"), pytest.mark.usefixtures("one_torch_thread")]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
CHAT = "/v1/chat/completions"
MOST = 12
GREEDY = GenerationConfig(temperature=0, max_tokens=MOST)
NAMED = (("tiny", None), ("sea", "sea"), ("org/land", "org/land"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("adapters")
    return {name: str(tiny_adapters.write(path / name, seed)) for seed, name in enumerate(("sea", "org/land"), 1)}


@asynccontextmanager
async def adapted(**adapters: str) -> AsyncIterator[tuple[httpx.AsyncClient, AsyncEngine]]:
    """A client of the embedded model, with the admin routes."""
    async with AsyncEngine(EngineConfig("tiny", mode="local", adapters=adapters)) as engine:
        async with client_of(create_app(engine, api_key=KEY, admin=True), headers=AUTH) as client:
            yield client, engine


async def names(client: httpx.AsyncClient) -> list[str]:
    return [model["id"] for model in (await client.get("/v1/models")).json()["data"]]


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


def named_events(text: str) -> list[Any]:
    """The payloads of a stream whose events have names."""
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


async def chat(client: httpx.AsyncClient, model: str, stream: bool) -> tuple[str, str]:
    found = await post(client, CHAT, model=model, messages=QUESTION, temperature=0, max_tokens=MOST, stream=stream)
    if not stream:
        return found.json()["model"], found.json()["choices"][0]["message"]["content"]
    chunks = events(found.text)
    [name] = {chunk["model"] for chunk in chunks}
    return name, "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


async def message(client: httpx.AsyncClient, model: str, stream: bool) -> tuple[str, str]:
    body: dict[str, Any] = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": MOST}
    found = await post(client, "/v1/messages", **body, stream=stream)
    if not stream:
        return found.json()["model"], found.json()["content"][0]["text"]
    first, *rest = named_events(found.text)
    return first["message"]["model"], "".join(event["delta"].get("text", "") for event in rest if "delta" in event)


async def response(client: httpx.AsyncClient, model: str, stream: bool) -> tuple[str, str]:
    body: dict[str, Any] = {"model": model, "input": QUESTION[0]["content"], "temperature": 0}
    found = await post(client, "/v1/responses", **body, max_output_tokens=MOST, stream=stream)
    made = named_events(found.text) if stream else [{"response": found.json()}]
    [name] = {event["response"]["model"] for event in made if "response" in event}
    return name, made[-1]["response"]["output"][0]["content"][0]["text"]


async def completion(client: httpx.AsyncClient, model: str, stream: bool) -> tuple[str, str]:
    found = await post(client, "/tokenize", model=model, messages=QUESTION)
    body: dict[str, Any] = {"model": model, "prompt": found.json()["tokens"], "temperature": 0, "max_tokens": MOST}
    found = await post(client, "/v1/completions", **body, stream=stream)
    made = events(found.text) if stream else [found.json()]
    [name] = {each["model"] for each in made}
    return name, "".join(each["choices"][0]["text"] for each in made)


async def say(client: httpx.AsyncClient, model: str) -> str:
    """What a model answers to the question."""
    name, text = await chat(client, model, stream=False)
    assert name == model
    return text


@pytest.mark.parametrize("route", [chat, message, response, completion])
async def test_the_name_of_an_adapter_is_a_model(route: Any, adapters: dict[str, str]) -> None:
    said = []
    async with adapted(**adapters) as (client, engine):
        for name, adapter in NAMED:
            answer = await engine.chat(QUESTION, GREEDY, RequestOptions(adapter=adapter))
            assert await route(client, name, False) == (name, answer.text)
            assert await route(client, name, True) == (name, answer.text)
            said.append(answer.text)
    assert said[0] == PARIS and len(set(said)) == 3


async def test_the_name_of_an_adapter_is_a_model_where_nothing_is_generated(adapters: dict[str, str]) -> None:
    texts, first = ["Once upon a time", "The sea"], []
    async with adapted(**adapters) as (client, engine):
        for name, adapter in NAMED:
            options = RequestOptions(adapter=adapter)
            found = (await post(client, "/v1/embeddings", model=name, input=texts)).json()
            assert found["model"] == name
            for item, embedding in zip(found["data"], await engine.embed(texts, options=options), strict=True):
                assert item["embedding"] == pytest.approx(embedding.vector.tolist(), abs=1e-5)
            first.append(found["data"][0]["embedding"])

            [score] = await engine.score(texts[:1], options=options)
            body = {"prompt": texts[0], "max_tokens": 0, "echo": True, "logprobs": 0}
            found = (await post(client, "/v1/completions", model=name, **body)).json()
            scores = [entry.logprob for entry in score.logprobs[1:] if entry is not None]
            assert found["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(scores, abs=1e-4)

            counted = (await post(client, "/v1/messages/count_tokens", model=name, messages=QUESTION)).json()
            ids = (await post(client, "/tokenize", model=name, messages=QUESTION)).json()["tokens"]
            assert counted["input_tokens"] == len(ids)
            text = (await post(client, "/detokenize", model=name, tokens=ids)).json()["prompt"]
            assert QUESTION[0]["content"] in text
    assert first[0] != first[1] != first[2] != first[0]


async def test_several_are_answered_at_a_time(adapters: dict[str, str]) -> None:
    async with adapted(**adapters) as (client, _):
        asked = [name for name, _ in NAMED]
        alone = [await say(client, name) for name in asked]
        together = await asyncio.gather(*[say(client, name) for name in asked * 3])
        assert list(together) == alone * 3
        assert alone[0] == PARIS and len(set(alone)) == 3


async def test_a_name_that_nobody_has_is_a_404_that_says_who_there_is(adapters: dict[str, str]) -> None:
    async with adapted(sea=adapters["sea"]) as (client, _):
        for path, body in (
            (CHAT, {"messages": QUESTION}),
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/responses", {"input": "a"}),
            ("/v1/messages", {"messages": QUESTION, "max_tokens": 1}),
            ("/v1/embeddings", {"input": "a"}),
        ):
            for name in ("lake", "SEA", ""):
                refused = await client.post(path, json={"model": name, **body})
                assert refused.status_code == 404 and error(refused)["param"] == "model"
                assert error(refused)["code"] == "model_not_found"
                assert error(refused)["message"].endswith(
                    f"{name!r} does not exist; there is 'tiny', with the adapters 'sea'"
                )


async def test_models_are_listed_with_their_adapters_behind_them(adapters: dict[str, str]) -> None:
    async with adapted(**adapters) as (client, _):
        model, sea, land = (await client.get("/v1/models")).json()["data"]
        assert (model["id"], model["root"], model["parent"]) == ("tiny", "tiny", None)
        assert sea == model | {"id": "sea", "parent": "tiny"} and land == sea | {"id": "org/land"}
        assert (await client.get("/v1/models/tiny")).json() == model
        assert (await client.get("/v1/models/org/land")).json() == land
        unknown = await client.get("/v1/models/land")
        assert unknown.status_code == 404 and error(unknown)["code"] == "model_not_found"
        assert "'sea', 'org/land'" in error(unknown)["message"]
    async with AsyncEngine(EngineConfig("tiny", mode="local", adapters=adapters)) as engine:
        async with client_of(create_app(engine, served_model_name="mine")) as client:
            assert {entry["parent"] for entry in (await client.get("/v1/models")).json()["data"]} == {None, "mine"}


async def test_the_model_goes_before_an_adapter_of_its_name(adapters: dict[str, str]) -> None:
    async with adapted() as (client, engine):
        await engine.load_adapter("tiny", adapters["sea"])
        assert await say(client, "tiny") == PARIS
        assert await names(client) == ["tiny"]


async def test_an_adapter_is_loaded_replaced_and_let_go(adapters: dict[str, str]) -> None:
    async with adapted() as (client, _):
        load = {"lora_name": "mine", "lora_path": adapters["sea"]}
        assert (await client.post("/v1/load_lora_adapter", json=load)).json() == {"adapters": ["mine"]}
        assert await names(client) == ["tiny", "mine"]
        first = await say(client, "mine")
        again = load | {"lora_path": adapters["org/land"]}
        refused = await client.post("/v1/load_lora_adapter", json=again)
        assert refused.status_code == 400 and error(refused)["param"] == "lora_name"
        assert error(refused)["message"].startswith("lora_name is 'mine', which is loaded already")
        assert await say(client, "mine") == first
        replaced = await client.post("/v1/load_lora_adapter", json=again | {"load_inplace": True})
        assert replaced.status_code == 200
        second = await say(client, "mine")
        assert len({PARIS, first, second}) == 3
        wrong = load | {"lora_path": "./nowhere", "load_inplace": True}
        assert (await client.post("/v1/load_lora_adapter", json=wrong)).status_code == 422
        assert await say(client, "mine") == second
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "mine", "lora_int_id": 1})
        assert gone.json() == {"adapters": []} and gone.headers["x-ignored-fields"] == "lora_int_id"
        assert await names(client) == ["tiny"]
        missing = await client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert missing.status_code == 404 and error(missing)["param"] == "lora_name"
        assert error(missing)["message"] == "lora_name is 'mine'; loaded: none"
        assert await say(client, "tiny") == PARIS


@pytest.mark.loops("each")
async def test_two_that_load_one_name_at_a_time_do_not_replace_each_other(
    adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with adapted() as (client, engine):
        load, begun, go = engine.load_adapter, asyncio.Event(), asyncio.Event()

        async def slowly(name: str, path: str) -> None:
            begun.set()
            await go.wait()
            await load(name, path)

        monkeypatch.setattr(engine, "load_adapter", slowly)
        body = {"lora_name": "mine", "lora_path": adapters["sea"]}
        first = asyncio.ensure_future(client.post("/v1/load_lora_adapter", json=body))
        await begun.wait()
        second = await client.post("/v1/load_lora_adapter", json=body)
        assert second.status_code == 400 and error(second)["param"] == "lora_name"
        go.set()
        assert (await first).status_code == 200


WRONG: list[tuple[str, dict[str, Any], int, str, str]] = [
    ("load", {}, 400, "lora_name", "lora_name"),
    ("load", {"lora_name": "x"}, 400, "lora_path", "lora_path"),
    ("load", {"lora_name": "", "lora_path": "x"}, 400, "lora_name", "length >= 1"),
    ("load", {"lora_name": "x", "lora_path": ""}, 400, "lora_path", "length >= 1"),
    ("load", {"lora_name": 3, "lora_path": "x"}, 400, "lora_name", "expected `str`"),
    ("load", {"lora_name": "x", "lora_path": ["x"]}, 400, "lora_path", "expected `str`"),
    ("load", {"lora_name": "x", "lora_path": "x", "load_inplace": 1}, 400, "load_inplace", "expected `bool`"),
    ("load", {"lora_name": "x", "lora_path": "x", "lora_rank": 8}, 400, "lora_rank", "unknown field"),
    ("load", {"lora_name": "x", "lora_path": "x", "is_3d_lora_weight": True}, 400, "is_3d_lora_weight", "experts"),
    ("load", {"lora_name": "tiny", "lora_path": "x"}, 400, "lora_name", "what the model itself is called"),
    ("load", {"lora_name": "x", "lora_path": "./nowhere"}, 422, "lora_path", "there is no such directory"),
    ("load", {"lora_name": "x", "lora_path": "."}, 422, "lora_path", "has no adapter_config.json"),
    ("load", {"lora_name": "x", "lora_path": "a\0b"}, 422, "lora_path", "there is no such directory"),
    ("unload", {}, 400, "lora_name", "lora_name"),
    ("unload", {"lora_name": ""}, 400, "lora_name", "length >= 1"),
    ("unload", {"lora_name": "tiny"}, 404, "lora_name", "loaded: none"),
    ("unload", {"lora_name": "x", "lora_path": "x"}, 400, "lora_path", "unknown field"),
]


async def test_what_cannot_be_loaded_or_let_go_is_said(tiny_client: httpx.AsyncClient) -> None:
    for route, body, status, param, said in WRONG:
        refused = await tiny_client.post(f"/v1/{route}_lora_adapter", json=body)
        assert refused.status_code == status, (body, refused.text)
        assert error(refused)["param"] == param and said in error(refused)["message"], body
        assert await names(tiny_client) == ["tiny"]


@pytest.fixture
async def tiny_client() -> AsyncIterator[httpx.AsyncClient]:
    async with adapted() as (client, _):
        yield client


async def test_an_adapter_that_is_damaged_is_refused(
    adapters: dict[str, str], tmp_path: Path, tiny_client: httpx.AsyncClient
) -> None:
    shutil.copytree(adapters["sea"], tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    body = {"lora_name": "x", "lora_path": str(tmp_path)}
    refused = await tiny_client.post("/v1/load_lora_adapter", json=body)
    assert refused.status_code == 422 and error(refused)["code"] == "adapter"
    assert "cannot be read" in error(refused)["message"]


async def test_a_model_that_takes_none_says_so() -> None:
    class Rigid(ScriptedLoader):
        def load(self, plan: LoadPlan) -> LoadedModel:
            return dataclasses.replace(super().load(plan), adapting=None, adapter_format=None)

    engine = AsyncEngine(EngineConfig(MODEL), loader=Rigid(tokenizer=ByteTokenizer()))
    async with served(engine, api_key=KEY, admin=True) as client:
        body = {"lora_name": "x", "lora_path": "x"}
        refused = await client.post("/v1/load_lora_adapter", json=body, headers=AUTH)
        assert refused.status_code == 422 and error(refused)["message"] == "'scripted' takes no adapters"


async def test_the_two_routes_are_admin_routes() -> None:
    async with served(api_key=KEY) as client:
        for route in ("load", "unload"):
            body = {"lora_name": "x", "lora_path": "x"}
            assert (await client.post(f"/v1/{route}_lora_adapter", json=body, headers=AUTH)).status_code == 404
    async with served(api_key=KEY, admin=True) as client:
        for route in ("load", "unload"):
            assert (await client.post(f"/v1/{route}_lora_adapter", json={"lora_name": "x"})).status_code == 401
            form = await client.post(f"/v1/{route}_lora_adapter", data={"lora_name": "x"}, headers=AUTH)
            assert form.status_code == 415
            assert (await client.get(f"/v1/{route}_lora_adapter", headers=AUTH)).status_code == 405


async def test_without_a_model_there_is_nothing_to_adapt() -> None:
    async with AsyncEngine() as engine, client_of(create_app(engine, api_key=KEY, admin=True), headers=AUTH) as client:
        for route in ("load", "unload"):
            body = {"lora_name": "x"} | ({"lora_path": "x"} if route == "load" else {})
            refused = await client.post(f"/v1/{route}_lora_adapter", json=body)
            assert refused.status_code == 503 and refused.headers["retry-after"], refused.text


async def test_an_engine_that_sleeps_takes_none(adapters: dict[str, str]) -> None:
    async with adapted(sea=adapters["sea"]) as (client, engine):
        await engine.sleep()
        load = {"lora_name": "x", "lora_path": adapters["sea"]}
        assert (await client.post("/v1/load_lora_adapter", json=load)).status_code == 409
        assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "sea"})).status_code == 409
        await engine.wake()
        assert await names(client) == ["tiny", "sea"]


@pytest.mark.loops("each")
async def test_answers_that_are_under_way_end_with_an_error_when_their_adapter_goes(adapters: dict[str, str]) -> None:
    config = EngineConfig("tiny", mode="local", adapters={"sea": adapters["sea"]})
    body: dict[str, Any] = {"model": "sea", "messages": QUESTION, "ignore_eos": True}
    async with AsyncEngine(config) as engine, listening(create_app(engine, api_key=KEY, admin=True)) as url:
        async with httpx.AsyncClient(base_url=url, headers=AUTH, trust_env=False, timeout=60) as client:
            async with client.stream("POST", CHAT, json=body | {"stream": True}) as stream:
                lines = stream.aiter_lines()
                await anext(lines)
                await engine.pause()  # so that nothing ends by itself
                whole = asyncio.ensure_future(client.post(CHAT, json=body))
                embedding = asyncio.ensure_future(client.post("/v1/embeddings", json={"model": "sea", "input": "a"}))
                other = asyncio.ensure_future(say(client, "tiny"))
                now = engine.metrics
                await until(lambda: now().num_requests_running + now().num_requests_waiting == 4)
                gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "sea"})
                assert gone.status_code == 200
                rest = [line async for line in lines if line]
                assert rest[-1] == "data: [DONE]"
                assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "request_aborted"
            for refused in (await whole, await embedding):
                assert refused.status_code == 503 and error(refused)["code"] == "request_aborted"
                assert refused.headers["retry-after"]
            await engine.resume()
            assert await other == PARIS
            refused = await client.post(CHAT, json=body)
            assert refused.status_code == 404 and error(refused)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": QUESTION}),
        (CHAT, {"messages": QUESTION, "stream": True}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/responses", {"input": "a", "stream": True}),
        ("/v1/messages", {"messages": QUESTION, "max_tokens": 1, "stream": True}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
async def test_an_adapter_that_goes_before_its_request_is_admitted_is_a_404(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Service, "check_serving", lambda self, model: Served(model, model))  # as it was a moment before
    async with served() as client:
        refused = await client.post(path, json={"model": "sea", **body})
        assert refused.status_code == 404, refused.text
        assert error(refused)["param"] == "model" and error(refused)["code"] == "model_not_found"
        assert error(refused)["message"] == "model is 'sea'; loaded: none"


async def test_a_reload_brings_adapters_and_takes_them(adapters: dict[str, str]) -> None:
    async with adapted(sea=adapters["sea"]) as (client, _):
        model = {"model": "tiny", "mode": "local"}
        body = {"config": model | {"adapters": {"land": adapters["org/land"]}}, "stream": False}
        found = await client.post("/admin/reload", json=body)
        assert found.json()["config"]["adapters"] == {"land": adapters["org/land"]}
        assert await names(client) == ["tiny", "land"]
        assert await say(client, "land") not in (PARIS, "")
        for given, status, param in (
            ({"land": "./nowhere"}, 422, "config.adapters"),
            ({"land": ""}, 400, "config.adapters"),
            ({"": "x"}, 400, "config.adapters"),
            (["x"], 400, "config.adapters"),
            ({"tiny": adapters["sea"]}, 400, "config.adapters"),
        ):
            wrong = await client.post("/admin/reload", json={"config": model | {"adapters": given}, "stream": False})
            assert wrong.status_code == status and error(wrong)["param"] == param, wrong.text
        assert await names(client) == ["tiny", "land"]
        assert (await client.post("/admin/reload", json={"config": model, "stream": False})).status_code == 200
        assert await names(client) == ["tiny"]


async def test_the_client_of_openai_uses_them(adapters: dict[str, str]) -> None:
    openai = pytest.importorskip("openai")
    config = EngineConfig("tiny", mode="local", adapters={"sea": adapters["sea"]})
    async with AsyncEngine(config) as engine, listening(create_app(engine, api_key=KEY, admin=True)) as url:
        expected = (await engine.chat(QUESTION, GREEDY, RequestOptions(adapter="sea"))).text
        options = {"base_url": f"{url}/v1", "api_key": KEY, "max_retries": 0, "_strict_response_validation": True}
        async with openai.AsyncOpenAI(**options) as client:
            assert [model.id async for model in client.models.list()] == ["tiny", "sea"]
            assert (await client.models.retrieve("sea")).parent == "tiny"
            asked: dict[str, Any] = {"model": "sea", "messages": QUESTION, "temperature": 0, "max_tokens": MOST}
            found = await client.chat.completions.create(**asked)
            assert (found.model, found.choices[0].message.content) == ("sea", expected)
            chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
            assert {chunk.model for chunk in chunks} == {"sea"}
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
            response = await client.responses.create(model="sea", input="hello", max_output_tokens=3)
            assert response.model == "sea"
            vectors = await client.embeddings.create(model="sea", input="hello", encoding_format="float")
            plain = await client.embeddings.create(model="tiny", input="hello", encoding_format="float")
            assert vectors.model == "sea" and vectors.data[0].embedding != plain.data[0].embedding
            body = {"lora_name": "land", "lora_path": adapters["org/land"]}
            loaded = json.loads(await client.post("/load_lora_adapter", cast_to=str, body=body))
            assert loaded == {"adapters": ["sea", "land"]}
            found = await client.completions.create(model="land", prompt="Once", max_tokens=2)
            assert found.model == "land"
            with pytest.raises(openai.BadRequestError, match="loaded already"):
                await client.post("/load_lora_adapter", cast_to=str, body=body)
            await client.post("/unload_lora_adapter", cast_to=str, body={"lora_name": "land"})
            with pytest.raises(openai.NotFoundError) as gone:
                await client.chat.completions.create(model="land", messages=QUESTION)
            assert gone.value.param == "model"


def test_an_adapter_that_has_the_model_s_name_is_refused_before_anything_is_loaded() -> None:
    from asyncengine import ConfigError
    from asyncengine.server.serve import serve

    with pytest.raises(ConfigError, match="adapters has 'mine', which is what the model itself is called"):
        serve(EngineConfig("tiny", adapters={"mine": "x"}), served_model_name="mine", port=0)
