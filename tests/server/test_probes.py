from __future__ import annotations

import asyncio
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from asyncengine import AsyncEngine, EngineConfig, EngineState
from asyncengine.server import create_app
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.server.serving import MODEL, chat, client_of, completion, echo_engine, error, served, until

pytestmark = pytest.mark.loops("either")

NAMES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio", "prompt_tokens", "generation_tokens",
    "requests", "preemptions", "prefix_cache_queries", "prefix_cache_hits", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_seconds", "request_prefill_seconds",
    "request_decode_seconds", "admission_rejections", "step_seconds", "batch_size", "event_loop_lag_seconds",
    "handoff_seconds", "merged_deltas", "http_requests", "http_rejections", "draft_tokens", "accepted_draft_tokens",
    "warm_up_pieces", "warm_up_pieces_done", "states_total", "states_cached",
}  # fmt: skip


async def test_metrics_are_valid_prometheus_text_with_the_names_that_were_promised() -> None:
    async with served() as client:
        await client.post("/v1/completions", json=completion("hello"))
        await client.post("/v1/completions", json=completion("hello", max_tokens=2, n=2, stream=True))
        answer = await client.get("/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {f"asyncengine_{name}" for name in NAMES} <= set(families)
    assert all(family.documentation for family in families.values())
    samples = {
        (sample.name, sample.labels.get("finish_reason") or sample.labels.get("le")): sample
        for family in families.values()
        for sample in family.samples
    }
    assert samples["asyncengine_prompt_tokens_total", None].value == 10
    assert samples["asyncengine_generation_tokens_total", None].value == 6 + 4
    assert samples["asyncengine_requests_total", "stop"].value == 1
    assert samples["asyncengine_requests_total", "length"].value == 1
    assert samples["asyncengine_num_requests_running", None].labels == {"model_name": MODEL, "engine": "0"}
    assert samples["asyncengine_request_decode_seconds_count", None].value == 2
    assert samples["asyncengine_batch_size_count", None].value > 0


async def test_health_and_metrics_tell_how_far_a_warm_up_is() -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer(), warm_up_pieces=3)
    loader.hold_warm_ups = True
    async with AsyncEngine(EngineConfig(MODEL), loader=loader) as engine, client_of(create_app(engine)) as client:
        [warm_up] = loader.warm_ups
        assert (await client.get("/health")).json()["warm_up"] == {"done": 0, "of": 3, "goes_on": True}
        assert (await client.get("/ready")).status_code == 200
        warm_up.let(3)
        await until(lambda: not engine.health().warm_up.goes_on)
        assert (await client.get("/health")).json()["warm_up"] == {"done": 3, "of": 3, "goes_on": False}
        assert (
            'asyncengine_warm_up_pieces_done{engine="0",model_name="scripted"} 3.0'
            in (await client.get("/metrics")).text
        )


async def test_histograms_are_cumulative_and_end_at_their_count() -> None:
    async with served() as client:
        await client.post("/v1/completions", json=completion("hello"))
        text = (await client.get("/metrics")).text
    for family in text_string_to_metric_families(text):
        if family.type != "histogram":
            continue
        buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
        counts = [sample.value for sample in family.samples if sample.name.endswith("_count")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == counts[0] or not counts


async def test_each_application_has_a_registry_of_its_own() -> None:
    async with echo_engine() as engine:
        async with client_of(create_app(engine)) as one, client_of(create_app(engine, engine_name="b")) as other:
            await one.get("/health")
            assert 'route="/health"' in (await one.get("/metrics")).text
            text = (await other.get("/metrics")).text
            assert 'route="/health"' not in text and 'engine="b"' in text


async def test_ready_follows_the_engine_and_requests_do_too() -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    loader.gate = threading.Event()
    engine = AsyncEngine(EngineConfig(MODEL), loader=loader)
    async with client_of(create_app(engine)) as client:
        before = await client.get("/ready")
        assert before.status_code == 503 and error(before)["code"] == "engine_unloaded"
        assert (await client.get("/v1/models")).json()["data"] == []
        loading = asyncio.ensure_future(engine.reload(EngineConfig(MODEL)))
        await until(lambda: engine.state is EngineState.LOADING)
        for method, path, body in (
            ("GET", "/ready", None),
            ("POST", "/v1/completions", completion()),
            ("POST", "/v1/chat/completions", chat(stream=True)),
            ("POST", "/tokenize", {"prompt": "a"}),
        ):
            answer = await client.request(method, path, json=body)
            assert answer.status_code == 503, path
            assert error(answer)["code"] == "engine_loading" and answer.headers["retry-after"] == "1"
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        loader.gate.set()
        await loading
        ready = await client.get("/ready")
        assert ready.status_code == 200 and ready.json()["model"] == MODEL
        await engine.pause()
        assert (await client.get("/ready")).status_code == 503
        await engine.shutdown()
        closed = await client.post("/v1/completions", json=completion())
        assert closed.status_code == 503 and error(closed)["code"] == "engine_closed"
        assert (await client.get("/health")).status_code == 503


async def test_a_lost_device_is_a_503_and_unhealthy() -> None:
    engine = echo_engine()
    async with served(engine) as client:
        await engine.debug_call_func_on_all_workers("lose_device")
        first = await client.post("/v1/completions", json=completion())
        assert first.status_code == 500 and error(first)["code"] == "step"
        second = await client.post("/v1/completions", json=completion())
        assert second.status_code == 503 and error(second)["code"] == "engine_failed"
        health = await client.get("/health")
        assert health.status_code == 503 and "the device is lost" in health.json()["problems"][0]


@pytest.mark.parametrize(
    ("loaded", "named"),
    [("some/model", "some/model"), ("/somewhere/a-model", "a-model"), ("./a-model", "a-model"), ("tiny", "tiny")],
)
async def test_a_model_is_called_by_its_name_and_not_by_where_it_lies(loaded: str, named: str) -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    async with served(AsyncEngine(EngineConfig(loaded), loader=loader)) as client:
        [model] = (await client.get("/v1/models")).json()["data"]
        assert model["id"] == named and model["max_model_len"] == 4096
        assert (await client.get(f"/v1/models/{named}")).json() == model
        unknown = await client.get("/v1/models/other/one")
        assert unknown.status_code == 404 and error(unknown)["code"] == "model_not_found"


async def test_another_model_than_the_one_served_is_not_found() -> None:
    async with served(served_model_name="mine") as client:
        found = await client.post("/v1/completions", json=completion() | {"model": "mine"})
        assert found.status_code == 200 and found.json()["model"] == "mine"
        other = await client.post("/v1/completions", json=completion() | {"model": "other"})
        assert other.status_code == 404 and "'mine'" in error(other)["message"]
