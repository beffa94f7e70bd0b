from __future__ import annotations

import asyncio
import base64
import gc
import logging
from contextlib import aclosing

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from asyncengine import AsyncEngineError, ConfigError
from asyncengine.server import ServerSettings, create_app, gate
from asyncengine.server.refusal import Refusal
from tests.server.serving import (
    AUTH,
    KEY,
    chat,
    client_of,
    completion,
    echo_engine,
    error,
    listening,
    served,
    until,
)

ROUTES = ["/ready", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/tokenize", "/nothing-here"]


async def test_every_route_but_health_asks_for_the_key() -> None:
    async with served(api_key=KEY) as client:
        assert (await client.get("/health")).status_code == 200
        for route in ROUTES:
            for method in ("GET", "POST"):
                refused = await client.request(method, route)
                assert refused.status_code == 401
                assert error(refused)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        AUTH,
        {"authorization": f"bearer {KEY}"},
        {"x-api-key": KEY},
        {"authorization": "Basic " + base64.b64encode(f"anyone:{KEY}".encode()).decode()},
    ],
    ids=["bearer", "any case", "x-api-key", "basic"],
)
async def test_the_key_may_be_given_in_the_ways_that_clients_have(headers: dict[str, str]) -> None:
    async with served(api_key=KEY) as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": KEY},
        {"authorization": "Bearer "},
        {"authorization": "Basic !!!"},
        {"x-api-key": "k\u00e9y".encode().decode("latin-1")},
    ],
)
async def test_a_wrong_key_is_refused(headers: dict[str, str]) -> None:
    async with served(api_key=KEY) as client:
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        assert (await client.get("/v1/models", headers=raw)).status_code == 401


async def test_keys_are_compared_in_constant_time_and_at_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[tuple[int, int]] = []

    def compare(given: bytes, known: bytes) -> bool:
        lengths.append((len(given), len(known)))
        return compare_digest(given, known)

    compare_digest = gate.hmac.compare_digest
    monkeypatch.setattr(gate.hmac, "compare_digest", compare)
    async with served(api_key=KEY) as client:
        for key in ("", "k", KEY[:-1], KEY, KEY * 50):
            headers = {"x-api-key": key, "authorization": f"Bearer {key}"}
            assert (await client.get("/ready", headers=headers)).status_code == (200 if key == KEY else 401)
    assert lengths == [(32, 32)] * 10  # both that are given, also where the first one is right


async def test_a_request_s_id_comes_back_and_one_is_made_up_where_there_is_none() -> None:
    async with served() as client:
        mine = await client.get("/health", headers={"x-request-id": "mine-1"})
        assert mine.headers["x-request-id"] == "mine-1"
        made = {(await client.get("/health")).headers["x-request-id"] for _ in range(2)}
        assert len(made) == 2
        strange = await client.get("/health", headers={"x-request-id": "a b<script>"})
        assert strange.headers["x-request-id"] != "a b<script>"
        refused = await client.post("/v1/completions", json={}, headers={"x-request-id": "mine-2"})
        assert refused.status_code == 400 and refused.headers["x-request-id"] == "mine-2"


async def test_a_body_that_is_too_large_is_refused() -> None:
    async with served(max_body_bytes=100) as client:
        announced = await client.post("/v1/completions", json=completion("x" * 100))
        assert announced.status_code == 413 and error(announced)["code"] == "body_too_large"

        async def pieces():  # type: ignore[no-untyped-def]
            for _ in range(20):
                yield b'"aaaaaaaa",'

        headers = {"content-type": "application/json"}
        async with aclosing(pieces()) as body:
            chunked = await client.post("/v1/completions", content=body, headers=headers)
            assert chunked.status_code == 413


async def test_a_refused_request_is_no_garbage() -> None:
    def errors() -> list[object]:
        return [kept for kept in gc.get_objects() if isinstance(kept, (Refusal, AsyncEngineError))]

    async with served(echo_engine(max_single_sequence_length=100), max_body_bytes=1000) as client:
        headers = {"content-type": "application/json"}
        gc.disable()
        try:
            before = len(errors())
            for route, body, status in [
                ("/v1/completions", b"x" * 1001, 413),
                ("/v1/completions", b"{", 400),
                ("/v1/completions", b'{"prompt": "a", "max_tokens": -1}', 400),
                ("/v1/chat/completions", b'{"messages": [], "n": 0}', 400),
                ("/v1/completions", b'{"prompt": "' + b"x" * 900 + b'"}', 400),
                ("/v1/embeddings", b'{"input": "' + b"x" * 900 + b'"}', 400),
                ("/v1/messages", b'{"model": "nothing"}', 400),
                ("/tokenize", b"[]", 400),
                ("/v1/nothing", b"{}", 404),
            ]:
                refused = await client.post(route, content=body, headers=headers)
                assert refused.status_code == status, refused.text
                assert len(errors()) == before, (route, errors())
        finally:
            gc.enable()


async def test_a_body_that_does_not_come_is_given_up() -> None:
    async with echo_engine() as engine, listening(create_app(engine, body_seconds=0.05)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: 100\r\n\r\n{")
        line = await reader.readline()
        writer.close()
        assert b" 408 " in line


async def test_headers_that_are_too_large_are_refused() -> None:
    async with served(max_header_bytes=1000) as client:
        refused = await client.get("/v1/models", headers={"x-large": "x" * 1000})
        assert refused.status_code == 431 and error(refused)["code"] == "headers_too_large"


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        ('{"prompt": "a"}', "text/plain", 415, "content_type"),
        ('{"prompt": "a"}', "application/x-www-form-urlencoded", 415, "content_type"),
        ('{"prompt": ', "application/json", 400, "invalid_json"),
        ("\xff\xfe", "application/json", 400, "invalid_json"),
        ("[" * 100_000, "application/json", 400, "invalid_json"),
        ('{"prompt": NaN}', "application/json", 400, "invalid_json"),
        ("[]", "application/json; charset=utf-8", 400, "invalid_body"),
        ("", "application/json", 400, "invalid_json"),
    ],
)
async def test_what_is_not_json_is_refused(content: str, kind: str, status: int, code: str) -> None:
    async with served() as client:
        refused = await client.post("/v1/completions", content=content, headers={"content-type": kind})
        assert refused.status_code == status and error(refused)["code"] == code


async def test_too_many_requests_at_a_time_are_told_to_come_back() -> None:
    engine = echo_engine()
    async with served(engine, max_concurrency=1) as client:
        await engine.pause()
        first = asyncio.ensure_future(client.post("/v1/completions", json=completion()))
        await until(lambda: bool(engine.metrics().num_requests_waiting))
        refused = await client.post("/v1/completions", json=completion())
        assert refused.status_code == 429 and error(refused)["code"] == "max_concurrency"
        assert refused.headers["retry-after"] == "1"
        assert (await client.get("/metrics")).status_code == 200
        await engine.resume()
        assert (await first).status_code == 200
        assert (await client.post("/v1/completions", json=completion())).status_code == 200


async def test_a_full_queue_answers_429_with_retry_after() -> None:
    engine = echo_engine(max_num_sequence=1, max_queue_size=1)
    async with served(engine, retry_after_seconds=7) as client:
        await engine.pause()
        first = asyncio.ensure_future(client.post("/v1/completions", json=completion()))
        await until(lambda: bool(engine.metrics().num_requests_waiting))
        for fields in ({}, {"stream": True}):
            refused = await client.post("/v1/chat/completions", json=chat(**fields))
            assert refused.status_code == 429 and error(refused)["code"] == "engine_overloaded"
            assert refused.headers["retry-after"] == "7"
        await engine.resume()
        assert (await first).status_code == 200


async def test_other_origins_are_let_in_only_where_they_are_named() -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with served() as client:
        answer = await client.options("/v1/completions", headers=preflight)
        assert "access-control-allow-origin" not in answer.headers
        answer = await client.get("/v1/models", headers=preflight)
        assert "access-control-allow-origin" not in answer.headers
    async with served(cors_origins=["https://a.example"], api_key=KEY) as client:
        answer = await client.options("/v1/completions", headers=preflight)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = await client.options("/v1/completions", headers=preflight | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_unknown_paths_and_methods_have_the_same_shape_of_error() -> None:
    async with served() as client:
        missing = await client.get("/v1/nothing")
        assert missing.status_code == 404 and error(missing)["type"] == "not_found_error"
        method = await client.put("/v1/completions")
        assert method.status_code == 405 and error(method)["type"] == "invalid_request_error"


async def test_what_nobody_expected_is_a_500_and_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = echo_engine()
    async with served(engine) as client:
        monkeypatch.setattr(type(engine), "health", lambda self: 1 / 0)
        refused = await client.get("/health")
        assert refused.status_code == 500
        assert error(refused)["code"] == "internal_error" and "division" not in refused.text
    assert any(record.exc_info and "division" in str(record.exc_info[1]) for record in caplog.records)


async def test_a_line_per_request_is_logged_for_whoever_listens(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "asyncengine.server"):
        async with served() as client:
            await client.get("/health")
            await client.post("/tokenize", json={"prompt": "a"}, headers={"x-request-id": "mine"})
    [line] = caplog.messages
    assert line.startswith("POST /tokenize 200 ") and line.endswith(" ms mine")
    assert not logging.getLogger("asyncengine.server").handlers


async def test_a_path_cannot_write_lines_of_its_own_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "asyncengine.server"):
        async with served() as client:
            assert (await client.get("/x%0AINFO%20all%20is%20well%1B%5B2J")).status_code == 404
    [line] = caplog.messages
    assert line.startswith("GET /x%0AINFO%20all%20is%20well%1B%5B2J 404 ")


async def test_an_application_can_be_mounted_below_another() -> None:
    async with echo_engine() as engine:
        outer = Starlette(routes=[Mount("/llm", create_app(engine, api_key=KEY))])
        async with client_of(outer) as client:
            assert (await client.get("/llm/health")).status_code == 200
            assert (await client.get("/llm/v1/models")).status_code == 401
            answer = await client.post("/llm/v1/completions", json=completion("hi"), headers=AUTH)
            assert answer.json()["choices"][0]["text"] == "hi"


async def test_its_own_lifespan_enters_and_leaves_the_engine() -> None:
    engine = echo_engine()
    app = create_app(engine, own_engine=True)
    async with app.router.lifespan_context(app):
        assert engine.state.value == "ready"
    assert engine.state.value == "closed"


@pytest.mark.parametrize(
    "fields",
    [
        {"admin": True},
        {"api_key": ""},
        {"api_key": "schl\u00fcssel"},
        {"api_key": "two\nlines"},
        {"cors_origins": "*"},
        {"max_body_bytes": 0},
        {"max_body_bytes": True},
        {"max_image_bytes": 0},
        {"max_audio_bytes": 0},
        {"max_video_bytes": 0},
        {"max_concurrency": 0},
        {"ping_seconds": 0},
        {"body_seconds": float("nan")},
        {"retry_after_seconds": -1},
        {"served_model_name": 3},
    ],
)
def test_settings_say_what_is_wrong_with_them(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ServerSettings(**fields)  # type: ignore[arg-type]


def test_settings_come_as_one_value_or_as_fields() -> None:
    engine = echo_engine()
    with pytest.raises(TypeError, match="api_key"):
        create_app(engine, ServerSettings(), api_key="x")
    with pytest.raises(TypeError, match="colour"):
        create_app(engine, colour="red")


async def test_a_client_that_sends_half_a_request_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asyncengine.server")
    async with echo_engine() as engine:
        app = create_app(engine)
        traffic = app.state.service.traffic
        async with listening(app) as url:
            _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n")
            writer.write(b"content-length: 100\r\n\r\n{")
            await until(lambda: traffic.active == 1)
            writer.close()
            await until(lambda: traffic.active == 0)
            [told] = [record for record in caplog.records if record.name == "asyncengine.server"]
            assert told.levelname == "INFO" and " 499 " in told.getMessage()  # no error: nobody was to be answered
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(f"{url}/health")).status_code == 200
