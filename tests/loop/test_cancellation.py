"""Leaving is aborting, however one leaves; and a cancellation at any await leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import anyio
import pytest
from harness import Rig, cancelled_at_every_await, endless, eventually, read

from asyncengine import (
    AsyncEngine,
    EngineClosedError,
    EngineConfig,
    EngineState,
    FinishReason,
    GenerationConfig,
    IllegalStateError,
    PendingStream,
    RequestOptions,
    RequestStream,
)
from asyncengine.loop import delivery
from asyncengine.testing import ScriptedLoader, media
from asyncengine.testing.media import MARKS, ScriptedTranscription
from asyncengine.transcription import AudioPiece, LanguageQuestion

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig(endless) as rig:
        yield rig


def freed_within_a_step(rig: Rig) -> None:
    """The step that was under way is the last one; the event loop does not get to run meanwhile."""
    steps = rig.model.steps
    rig.model.release()
    until = time.monotonic() + 5.0
    while (metrics := rig.metrics()).num_requests_running or metrics.kv_blocks_used:
        assert time.monotonic() < until, f"still running: {metrics}"
        time.sleep(0.0005)
    assert rig.model.steps == steps


# How one leaves


async def test_the_task_is_cancelled_while_it_waits(rig: Rig) -> None:
    stream = await rig.add_held()
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait([reader])
    assert reader.cancelled()
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_the_task_is_cancelled_in_the_loop_body(rig: Rig) -> None:
    streams = [await rig.add_held()]

    async def body() -> None:
        async for _ in streams.pop():
            await asyncio.sleep(3600)

    reader = asyncio.create_task(body())
    await asyncio.sleep(0.01)
    reader.cancel()
    await asyncio.wait([reader])
    assert reader.cancelled()
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_break_out_of_an_anonymous_iterator(rig: Rig) -> None:
    streams = [await rig.add_held()]
    async for _ in streams.pop():
        break
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_break_out_of_an_anonymous_pending_stream(rig: Rig) -> None:
    rig.model.hold()

    async def body() -> None:
        async for _ in rig.engine.stream("hello"):
            break

    reading = asyncio.create_task(body())
    await rig.held()
    rig.model.let()
    await reading
    rig.model.release()
    await rig.comes_to_rest()
    assert rig.model.steps <= 3


async def test_break_with_a_named_variable_and_drop_it(rig: Rig) -> None:
    stream = await rig.add_held()
    async for _ in stream:
        break
    del stream
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_break_with_a_named_variable_keeps_the_request(rig: Rig) -> None:
    stream = await rig.add_held()
    async for _ in stream:
        break
    await rig.let(3)
    assert rig.metrics().num_requests_running == 1
    assert (await anext(stream)).token_ids == [*b"bcd"]
    stream.abort()
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_leaving_async_with(rig: Rig) -> None:
    stream = await rig.add_held()
    async with stream:
        await anext(stream)
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_an_exception_leaves_async_with(rig: Rig) -> None:
    stream = await rig.add_held()
    with pytest.raises(ZeroDivisionError):
        async with stream:
            raise ZeroDivisionError
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_leaving_async_with_of_a_pending_stream(rig: Rig) -> None:
    rig.model.hold()
    threading.Timer(0.05, rig.model.let).start()
    async with rig.engine.stream("hello") as stream:
        await anext(stream)
        await rig.held()
        await rig.held()
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_asyncio_timeout(rig: Rig) -> None:
    stream = await rig.add_held()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            async for _ in stream:
                pass
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_anyio_move_on_after(rig: Rig) -> None:
    stream = await rig.add_held()
    with anyio.move_on_after(0.02) as scope:
        async for _ in stream:
            pass
    assert scope.cancelled_caught
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_wait_for_on_one_item_leaves_the_stream_readable(rig: Rig) -> None:
    stream = await rig.add_held()
    await anext(stream)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.02)
    freed_within_a_step(rig)
    outputs = await read(stream)
    assert outputs[-1].finish_reason is FinishReason.ABORT
    assert stream.result().text == "a"
    await rig.comes_to_rest()


async def test_a_cancelled_task_group(rig: Rig) -> None:
    streams = [await rig.add_held(), await _add_another(rig)]
    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(read(stream))
            await asyncio.sleep(0.01)
            raise ZeroDivisionError
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_a_cancelled_anyio_task_group(rig: Rig) -> None:
    streams = [await rig.add_held(), await _add_another(rig)]
    async with anyio.create_task_group() as group:
        for stream in streams:
            group.start_soon(read, stream)
        await asyncio.sleep(0.01)
        group.cancel_scope.cancel()
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_created_and_dropped(rig: Rig) -> None:
    await rig.add_held()  # the result is dropped at once
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_a_pending_stream_that_was_never_used(rig: Rig) -> None:
    rig.engine.stream("hello")
    rig.engine.chat([{"role": "user", "content": "hello"}])
    rig.engine.generate_many(["hello"])
    await rig.comes_to_rest()
    assert rig.model.steps == 0


async def test_an_await_that_was_never_begun_adds_nothing(rig: Rig) -> None:
    coroutine = rig.engine.generate("hello")
    coroutine.close()
    await rig.comes_to_rest()
    assert rig.model.steps == 0


@pytest.mark.loops("either")
async def test_cyclic_garbage_collected_on_another_thread(rig: Rig) -> None:
    class Cycle:
        def __init__(self, stream: RequestStream) -> None:
            self.me = self
            self.stream = stream

    gc.disable()
    try:
        watch = weakref.ref(Cycle(await rig.add_held()))
        assert watch() is not None
        await asyncio.to_thread(gc.collect)
        assert watch() is None
    finally:
        gc.enable()
    freed_within_a_step(rig)
    await rig.comes_to_rest()


@pytest.mark.loops("either")
async def test_cyclic_garbage_collected_on_the_step_thread(rig: Rig) -> None:
    class Cycle:
        def __init__(self, stream: RequestStream) -> None:
            self.me = self
            self.stream = stream

    where: list[str] = []
    gc.disable()
    try:
        cycle = Cycle(await rig.add_held())
        weakref.finalize(cycle, lambda: where.append(threading.current_thread().name))
        del cycle
        rig.model.collect = gc.collect  # type: ignore[attr-defined]
        collecting = asyncio.create_task(rig.engine.debug_call_func_on_all_workers("collect"))
        await asyncio.sleep(0)
        rig.model.release()
        await collecting
        assert where == ["asyncengine-step"]
    finally:
        gc.enable()
    await rig.comes_to_rest()


async def test_aclose(rig: Rig) -> None:
    stream = await rig.add_held()
    await stream.aclose()
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_aclosing(rig: Rig) -> None:
    stream = await rig.add_held()
    async with aclosing(stream):
        await anext(stream)
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_an_exception_in_the_consumer_frees_once_it_is_handled(rig: Rig) -> None:
    streams = [await rig.add_held()]

    async def consume() -> None:
        async for _ in streams.pop():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await consume()
    freed_within_a_step(rig)
    await rig.comes_to_rest()


async def test_a_many_stream_is_dropped(rig: Rig) -> None:
    rig.model.hold()
    threading.Timer(0.05, rig.model.let).start()
    async for _ in rig.engine.generate_many(["one", "two", "three"]):
        break
    rig.model.release()
    await rig.comes_to_rest()
    assert rig.model.steps <= 3


async def test_a_reader_of_a_many_stream_is_cancelled(rig: Rig) -> None:
    rig.model.hold()
    many = rig.engine.generate_many(["one", "two", "three"])

    async def consume() -> None:
        async for _ in many:
            pass

    reader = asyncio.create_task(consume())
    await rig.held()
    await rig.let(2)
    await asyncio.sleep(0.01)
    reader.cancel()
    await asyncio.wait([reader])
    assert reader.cancelled()
    freed_within_a_step(rig)
    await rig.comes_to_rest()
    assert [stream.ended for stream in many.streams] == [True] * 3


async def test_closing_a_pending_stream_while_it_begins(rig: Rig) -> None:
    rig.model.hold()
    pending = rig.engine.stream("hello")
    reader = asyncio.create_task(_read_pending(pending))
    await rig.held()
    await pending.aclose()
    rig.model.release()
    assert await asyncio.wait_for(reader, 5.0) == 0
    await rig.comes_to_rest()


@pytest.mark.parametrize("way", ["iteration", "result", "context"])
@pytest.mark.parametrize("kind", ["one", "many"])
async def test_closing_what_waits_behind_a_load(rig: Rig, kind: str, way: str) -> None:
    rig.loader.gate = threading.Event()
    reloading = asyncio.create_task(rig.engine.reload(rig.config))
    await eventually(lambda: rig.engine.state is EngineState.LOADING)
    pending = rig.engine.stream("hello") if kind == "one" else rig.engine.generate_many(["hello", "world"])

    async def use() -> object:
        match way:
            case "iteration":
                return [output async for output in pending]
            case "result":
                return await pending
            case _:
                return await pending.__aenter__()

    using = asyncio.create_task(use())
    await asyncio.sleep(0.01)
    await pending.aclose()
    if way == "iteration":
        assert await asyncio.wait_for(using, 5.0) == []
    else:
        with pytest.raises(IllegalStateError, match="closed before it began"):
            await asyncio.wait_for(using, 5.0)
    assert rig.engine.state is EngineState.LOADING
    rig.loader.gate.set()
    await reloading
    assert not any(rig.metrics().counters.requests.values())
    await rig.comes_to_rest()


async def test_the_other_requests_go_on(rig: Rig) -> None:
    stays = await rig.add_held("stays", GenerationConfig(max_tokens=20))
    leaves = await _add_another(rig)
    leaves.abort()
    rig.model.release()
    result = await stays
    assert result.finish_reason is FinishReason.LENGTH
    assert len(result.token_ids) == 20
    assert (await leaves).finish_reason is FinishReason.ABORT
    await rig.comes_to_rest()


async def test_a_request_that_waits_is_cancelled(rig: Rig) -> None:
    await rig.engine.pause()
    stream = await rig.engine.add_request("hello")
    assert rig.metrics().num_requests_waiting == 1
    del stream
    await eventually(lambda: rig.metrics().num_requests_waiting == 0)
    await rig.comes_to_rest()


# Cancellation at every await


async def test_at_every_await_of_add_request(rig: Rig) -> None:
    async def add() -> None:
        await rig.engine.add_request("hello")

    assert await cancelled_at_every_await(add, rig.comes_to_rest) == 1
    await rig.serves()


async def test_at_every_await_of_add_request_with_a_long_prompt(rig: Rig) -> None:
    async def add() -> None:
        await rig.engine.add_request("hello" * 204 + "x" * 10)

    rig.loader.tokenizer.encode = lambda text: [1, 2, 3]  # type: ignore[union-attr, method-assign]
    assert await cancelled_at_every_await(add, rig.comes_to_rest) >= 1
    await rig.serves()


async def test_at_every_await_of_add_request_behind_a_reload(rig: Rig) -> None:
    async def add() -> None:
        reload = asyncio.create_task(rig.engine.reload(rig.config))
        await asyncio.sleep(0)
        try:
            await rig.engine.add_request("hello")
        finally:
            if not reload.done():
                reload.cancel()

    async def after() -> None:
        await rig.engine.unpin_prompt("nothing")
        await eventually(lambda: rig.engine.state is EngineState.READY)
        await rig.comes_to_rest()

    assert await cancelled_at_every_await(add, after) >= 1
    await rig.serves()


async def test_at_every_await_of_add_request_with_a_full_queue() -> None:
    async with Rig(endless, max_queue_size=1, max_num_sequence=1) as rig:
        await rig.engine.pause()
        first = await rig.engine.add_request("first")

        async def add() -> None:
            with anyio.move_on_after(0.05):
                await rig.engine.add_request("second")

        async def after() -> None:
            await eventually(lambda: rig.metrics().num_requests_queued == 0)
            await eventually(lambda: len(rig.router._futures) == 0)
            assert rig.metrics().num_requests_waiting == 1

        await cancelled_at_every_await(add, after)
        first.abort()
        await rig.engine.resume()
        await rig.comes_to_rest()
        await rig.serves()


async def test_at_every_await_of_generate(rig: Rig) -> None:
    async def generate() -> None:
        await rig.engine.generate("hello", GenerationConfig(max_tokens=20))

    assert await cancelled_at_every_await(generate, rig.comes_to_rest) >= 1
    await rig.serves()


async def test_at_every_await_of_stream(rig: Rig) -> None:
    async def stream() -> None:
        async with rig.engine.stream("hello", GenerationConfig(max_tokens=20)) as stream:
            async for _ in stream:
                await asyncio.sleep(0)

    assert await cancelled_at_every_await(stream, rig.comes_to_rest) >= 1
    await rig.serves()


async def test_at_every_await_of_chat(rig: Rig) -> None:
    async def chat() -> None:
        async for _ in rig.engine.chat([{"role": "user", "content": "hi"}], GenerationConfig(max_tokens=10)):
            pass

    assert await cancelled_at_every_await(chat, rig.comes_to_rest) >= 1
    await rig.serves()


async def test_at_every_await_of_generate_many(rig: Rig) -> None:
    async def many() -> None:
        async for _ in rig.engine.generate_many(["one", "two"], GenerationConfig(max_tokens=10)):
            pass

    assert await cancelled_at_every_await(many, rig.comes_to_rest) >= 1
    await rig.serves()


async def test_at_every_await_of_awaiting_generate_many(rig: Rig) -> None:
    async def many() -> None:
        await rig.engine.generate_many(["one", "two"], GenerationConfig(max_tokens=10))

    assert await cancelled_at_every_await(many, rig.comes_to_rest) >= 1
    await rig.serves()


class Asking(ScriptedTranscription):
    """Asks which language is spoken, and hears two bytes at once."""

    question = LanguageQuestion(MARKS["audio"], {ord("a"): "en"})

    def pieces(self, audio: bytes) -> Iterator[AudioPiece]:
        return iter([AudioPiece(audio[at : at + 2]) for at in range(0, len(audio), 2)])


async def test_at_every_await_of_transcribe(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the language is found out, and while two pieces are heard."""
    monkeypatch.setattr(media, "ScriptedTranscription", Asking)
    rig = Rig(endless)
    rig.loader.takes_audio = True

    async def transcribe() -> None:
        found = await rig.engine.transcribe(b"abcd", GenerationConfig(max_tokens=5))
        assert (found.text, found.language) == ("abcdeabcde", "en")

    async with rig:
        assert await cancelled_at_every_await(transcribe, rig.comes_to_rest) >= 6
        await rig.serves()


async def test_at_every_await_of_pin_prompt(rig: Rig) -> None:
    async def pin() -> None:
        await rig.engine.unpin_prompt(await rig.engine.pin_prompt("a prompt to keep"))

    await cancelled_at_every_await(pin, _settled(rig))
    await rig.serves()


@pytest.mark.parametrize("in_flight", ["abort", "wait", "carry"])
@pytest.mark.parametrize("fits_beside", [True, False])
async def test_at_every_await_of_reload(in_flight: str, fits_beside: bool) -> None:
    async with Rig(endless, fits_beside=fits_beside) as rig:

        async def reload() -> None:
            stream = await rig.engine.add_request("hello", GenerationConfig(max_tokens=10))
            await rig.engine.reload(rig.config, in_flight)  # type: ignore[arg-type]
            await stream

        async def after() -> None:
            await eventually(lambda: rig.engine.state is EngineState.READY)
            await rig.comes_to_rest()

        assert await cancelled_at_every_await(reload, after) >= 1
        await rig.serves()
        assert [model.closed for model in rig.loader.models] == [True] * (len(rig.loader.models) - 1) + [False]


async def test_at_every_await_of_unload(rig: Rig) -> None:
    async def unload() -> None:
        await rig.engine.reload(rig.config)
        await rig.engine.unload()

    async def after() -> None:
        await eventually(lambda: rig.engine.state in (EngineState.READY, EngineState.UNLOADED))
        await rig.comes_to_rest()

    assert await cancelled_at_every_await(unload, after) == 2
    await rig.engine.reload(rig.config)
    await rig.serves()


@pytest.mark.parametrize("name", ["reset", "drain", "pause", "sleep"])
async def test_at_every_await_of_an_instruction(rig: Rig, name: str) -> None:
    async def call() -> None:
        stream = await rig.engine.add_request("hello", GenerationConfig(max_tokens=10))
        await getattr(rig.engine, name)()
        if name == "pause":
            await rig.engine.resume()
        if name == "sleep":
            await rig.engine.wake()
        await stream

    async def after() -> None:
        if name == "pause":
            await rig.engine.resume()
        if name == "sleep":
            await rig.engine.wake()
        await eventually(lambda: rig.engine.state is EngineState.READY)
        await rig.comes_to_rest()

    assert await cancelled_at_every_await(call, after) >= 1
    await rig.serves()


@pytest.mark.parametrize("drain", [0.0, 0.02, 10.0])
async def test_at_every_await_of_shutdown(drain: float) -> None:
    rigs: list[Rig] = []

    async def shutdown() -> None:
        rig = Rig(endless)
        rigs.append(rig)
        await rig.engine.reload(rig.config)
        stream = await rig.engine.add_request("hello", GenerationConfig(max_tokens=10))
        await rig.engine.shutdown(drain)
        await stream

    async def after() -> None:
        rig = rigs[-1]
        await rig.engine.shutdown()
        assert rig.engine.state is EngineState.CLOSED
        await eventually(lambda: not rig.engine._thread.alive)
        await eventually(lambda: rig.router.idle)
        assert all(model.closed for model in rig.loader.models)

    assert await cancelled_at_every_await(shutdown, after) >= 1


async def test_at_every_await_of_async_with() -> None:
    rigs: list[Rig] = []

    async def use() -> None:
        rig = Rig(endless)
        rigs.append(rig)
        async with rig.engine as engine:
            await engine.generate("hello", GenerationConfig(max_tokens=3))

    async def after() -> None:
        rig = rigs[-1]
        await eventually(lambda: not rig.engine._thread.alive)
        assert rig.engine.state is EngineState.CLOSED
        await eventually(lambda: rig.router.idle)
        await eventually(lambda: all(model.closed for model in rig.loader.models))
        with pytest.raises(EngineClosedError):
            await rig.engine.generate("hello")

    assert await cancelled_at_every_await(use, after) >= 1


async def test_a_cancelled_enter_ends_a_load_that_cannot_be_stopped() -> None:
    loader = ScriptedLoader()
    loader.gate = threading.Event()
    engine = AsyncEngine(EngineConfig("m"), loader=loader)
    entering = asyncio.create_task(engine.__aenter__())
    await eventually(lambda: (engine.health().loading or "").startswith("loading"))
    entering.cancel()
    await asyncio.wait([entering])
    assert entering.cancelled()
    await eventually(lambda: engine.state is EngineState.CLOSED)
    loader.gate.set()
    await eventually(lambda: bool(loader.models) and loader.model.closed)


# Helpers


def _settled(rig: Rig) -> Callable[[], Awaitable[None]]:
    async def after() -> None:
        await rig.engine.unpin_prompt("nothing")  # behind whatever was given
        await rig.comes_to_rest()

    return after


async def _add_another(rig: Rig) -> RequestStream:
    """With a step held: adds a second request, and returns while a step with both is held."""
    adding = asyncio.create_task(rig.engine.add_request("another", None, RequestOptions()))
    await asyncio.sleep(0)
    await rig.let(2)
    return await adding


async def _read_pending(pending: PendingStream) -> int:
    return len([output async for output in pending])


async def test_a_reader_that_is_closed_where_no_loop_runs() -> None:
    """As by the collector on another thread, in the middle of its wait."""
    async with Rig(endless) as rig:
        stream = await rig.add_held("x")
        while stream.take() is not None:
            pass
        reading = stream.__anext__()
        reading.send(None)
        await asyncio.to_thread(reading.close)
        rig.model.release()
        await eventually(lambda: stream.ended)
        assert (await stream).finish_reason == "abort"


@pytest.mark.parametrize("reader", ["python", "compiled"])
def test_a_reader_that_is_closed_where_another_loop_runs(
    compiled_delivery: bool, loop_factory: Callable[[], asyncio.AbstractEventLoop], reader: str
) -> None:
    """As of a task that was left waiting when its loop stopped, and is collected while the next one runs."""
    if reader == "compiled" and not compiled_delivery:
        pytest.skip("no compiler")
    (delivery.use_compiled if reader == "compiled" else delivery.use_python)()
    rig = Rig(endless)
    rig.engine.reload_nowait()

    async def wait_for_a_delta() -> tuple[RequestStream, Any]:
        await rig.engine.pause()
        stream = await rig.engine.add_request("x")
        reading: Any = anext(aiter(stream))
        reading.__await__().send(None)
        return stream, reading

    async def close() -> None:
        assert rig.metrics().num_requests_waiting == 1
        reading.close()
        await eventually(lambda: rig.metrics().num_requests_waiting == 0, within=1.0)

    first, second = loop_factory(), loop_factory()
    _stream, reading = first.run_until_complete(wait_for_a_delta())
    second.run_until_complete(close())
    rig.engine.shutdown_nowait()
    first.close()
    second.close()
