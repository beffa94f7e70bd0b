"""Spans of requests, read back from the SDK's exporter in memory."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, InvalidRequestError, RequestOptions, StepError
from asyncengine.classifier import Classifier
from asyncengine.testing import ByteTokenizer, ScriptedLoader, echo_engine, scripted_engine

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from asyncengine.otel import instrument

pytestmark = pytest.mark.loops("either")

USER = [{"role": "user", "content": "hello"}]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def finished(exporter: InMemorySpanExporter, engine: AsyncEngine, count: int) -> Sequence[ReadableSpan]:
    async with asyncio.timeout(10):
        while len(exporter.get_finished_spans()) < count:
            await engine.abort_request("nobody")
    found = exporter.get_finished_spans()
    assert len(found) == count
    return found


async def test_an_adapter_is_the_model_that_is_asked(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    async with scripted_engine("Hello", adapters={"shout": "HELLO"}) as engine:
        instrument(engine, provider)
        await engine.generate("?", options=RequestOptions(adapter="shout"))
        (span,) = await finished(exporter, engine, 1)
    assert span.name == "text_completion shout"
    assert attributes(span)["gen_ai.request.model"] == "shout"
    assert attributes(span)["gen_ai.response.model"] == "scripted"


async def test_a_request_is_a_span_below_its_callers(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    async with scripted_engine("Hello") as engine:
        instrument(engine, provider)
        config = GenerationConfig(max_tokens=50, temperature=0.5, seed=3, n=2, stop_strs="!")
        with provider.get_tracer("test").start_as_current_span("caller") as caller:
            result = await engine.chat(USER, config)
        span, outer = await finished(exporter, engine, 2)
    assert outer.name == "caller" and span.parent == caller.get_span_context()
    assert (span.name, span.kind) == ("chat scripted", SpanKind.INTERNAL)
    assert attributes(span) | {"asyncengine.queue_seconds": 0, "gen_ai.response.time_to_first_chunk": 0} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "asyncengine",
        "gen_ai.request.model": "scripted",
        "gen_ai.response.model": "scripted",
        "gen_ai.response.id": result.request_id,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stop_sequences": ("!",),
        "gen_ai.usage.input_tokens": result.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": result.usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.response.time_to_first_chunk": 0,
        "asyncengine.queue_seconds": 0,
        "asyncengine.preemptions": 0,
    }
    [event] = span.events
    assert event.name == "first token" and span.start_time <= event.timestamp <= span.end_time  # type: ignore[operator]
    assert span.status.status_code is StatusCode.UNSET


async def test_a_prompt_in_pieces_is_counted_once_it_is_whole(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    async def pieces() -> AsyncIterator[str]:
        yield "hel"
        yield "lo"

    async with echo_engine() as engine:
        instrument(engine, provider)
        await engine.generate(pieces())
        [span] = await finished(exporter, engine, 1)
    assert attributes(span)["gen_ai.usage.input_tokens"] == len("hello")


async def test_a_request_for_classes_is_of_a_kind_of_its_own(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    loader.classifier = Classifier(np.eye(3, dtype=np.float32), None, ("a", "b", "c"), "softmax")
    async with AsyncEngine(EngineConfig("scripted"), loader=loader) as engine:
        instrument(engine, provider)
        await engine.classify(["a"])
        [span] = await finished(exporter, engine, 1)
    assert span.name == "classification scripted" and attributes(span)["gen_ai.usage.input_tokens"] == 1
    assert "gen_ai.request.max_tokens" not in attributes(span)  # nothing is generated


async def test_names_are_those_of_the_conventions(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    conventions = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    known = {value for name, value in vars(conventions).items() if name.startswith("GEN_AI_")}
    operations = {operation.value for operation in conventions.GenAiOperationNameValues}
    everything = GenerationConfig(
        max_tokens=3, temperature=1, top_p=0.5, top_k=4, frequency_penalty=1, presence_penalty=1, seed=1, n=2
    )
    async with echo_engine() as engine:
        instrument(engine, provider)
        await asyncio.gather(engine.generate("a", everything), engine.chat(USER, everything), engine.embed(["a"]))
        spans = await finished(exporter, engine, 3)
    assert {span.name.split()[0] for span in spans} == {"chat", "text_completion", "embeddings"} <= operations
    used = {name for span in spans for name in attributes(span) if name.startswith("gen_ai.")}
    assert used <= known and len(used) > 15


async def test_each_ends_once_however_it_ends(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    answers = {1: b"x", 2: b"x" * 1000}
    loader = ScriptedLoader(lambda prompt, _: answers[len(prompt)], step_seconds=0.002, tokenizer=ByteTokenizer())
    async with AsyncEngine(EngineConfig("scripted"), loader=loader) as engine:
        instrument(engine, provider)
        loader.model.fail_next(ValueError("boom"))
        with pytest.raises(StepError):
            await engine.generate("a")
        with pytest.raises(InvalidRequestError):
            await engine.generate("a" * 100_000)  # refused before it begins
        async with engine.stream("ab") as stream:
            assert not stream.ended
        dropped = await engine.add_request("ab")
        del dropped
        gc.collect()
        await engine.generate_many(["a", "b"])
        spans = await finished(exporter, engine, 5)
    failed = spans[0]
    assert attributes(failed)["error.type"] == "StepError" and failed.status.status_code is StatusCode.ERROR
    reasons = sorted(attributes(span)["gen_ai.response.finish_reasons"] for span in spans[1:])
    assert reasons == [("abort",), ("abort",), ("stop",), ("stop",)]
    assert all("gen_ai.usage.output_tokens" in attributes(span) for span in spans)


async def test_nothing_is_made_where_it_is_off_and_little_where_nothing_is_sampled(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    async with echo_engine() as engine:
        await engine.generate("a")
        instrument(engine, provider)
        engine.observer = None
        await engine.generate("a")
        unsampled = TracerProvider(sampler=ALWAYS_OFF)
        instrument(engine, unsampled)
        assert (await engine.generate("a")).text == "a"
        instrument(engine)  # the process has no provider: the API's own spans, which do nothing
        assert (await engine.generate("a")).text == "a"
    assert not exporter.get_finished_spans()


async def test_over_http_the_parent_is_in_the_header_unless_there_is_a_span_already(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    pytest.importorskip("starlette")
    from tests.server.serving import chat, served

    headers = {"traceparent": PARENT}
    async with echo_engine() as engine:
        instrument(engine, provider)
        async with served(engine, served_model_name="scripted") as client:
            for stream in (False, True):
                answer = await client.post("/v1/chat/completions", json=chat(stream=stream), headers=headers)
                assert answer.status_code == 200
            (await client.post("/v1/completions", json={"prompt": "a"})).raise_for_status()
            with provider.get_tracer("test").start_as_current_span("framework") as framework:
                (await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)).raise_for_status()
            spans = await finished(exporter, engine, 5)
    whole, streamed, alone, inner, _ = spans
    for span in (whole, streamed):
        assert span.parent is not None and span.parent.is_remote
        assert trace.format_trace_id(span.context.trace_id) == PARENT.split("-")[1]  # type: ignore[union-attr]
        assert trace.format_span_id(span.parent.span_id) == PARENT.split("-")[2]
    assert alone.parent is None and inner.parent == framework.get_span_context()
