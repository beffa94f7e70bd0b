"""The two threads beside each other: who sleeps, who is not held up, and in which order things happen."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from harness import Rig, endless, eventually, read

from asyncengine import (
    Deadlines,
    EngineClosedError,
    EngineState,
    FinishReason,
    GenerationConfig,
    RequestOptions,
    RequestStream,
)

pytestmark = pytest.mark.timeout(60)


class CountedLoop:
    """Stands between a `StreamBack` and its loop, and counts."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.wakeups = 0

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> object:
        self.wakeups += 1
        return self.loop.call_soon_threadsafe(callback)

    def is_closed(self) -> bool:
        return self.loop.is_closed()


def counted(rig: Rig) -> CountedLoop:
    loop = CountedLoop(asyncio.get_running_loop())
    rig.router.stream_back._loop = loop
    return loop


def cpu_seconds(rig: Rig) -> float:
    thread = rig.engine._thread._thread
    assert thread is not None and thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no CPU clock per thread")
@pytest.mark.parametrize("idle", ["unloaded", "ready", "paused with requests", "sleeping with requests", "deadline"])
async def test_an_idle_engine_uses_no_cpu(rig: Rig, idle: str) -> None:
    await rig.serves()
    streams = []
    if idle == "unloaded":
        await rig.engine.unload()
    elif idle == "paused with requests":
        await rig.engine.pause()
        streams = [await rig.engine.add_request(f"request {i}") for i in range(5)]
    elif idle == "sleeping with requests":
        await rig.engine.sleep()
        streams = [await rig.engine.add_request(f"request {i}") for i in range(5)]
    elif idle == "deadline":
        await rig.engine.pause()
        streams = [await rig.engine.add_request("x", None, RequestOptions(deadlines=Deadlines(total=60.0)))]
    await asyncio.sleep(0.02)
    before, wakeups = cpu_seconds(rig), rig.router.stream_back.wakeups
    await asyncio.sleep(0.5)
    assert cpu_seconds(rig) - before < 0.002
    assert rig.router.stream_back.wakeups == wakeups
    for stream in streams:
        stream.abort()


async def test_a_blocked_loop_does_not_stop_the_steps() -> None:
    async with Rig(endless, step_seconds=0.002) as rig:
        stream = await rig.engine.add_request("x", GenerationConfig(max_tokens=900))
        await anext(stream)
        steps = rig.model.steps
        until = time.monotonic() + 30
        while rig.model.steps - steps <= 30:  # a loop that drove the steps would be here for ever
            time.sleep(0.2)  # noqa: ASYNC251
            assert time.monotonic() < until
        output = await anext(stream)
        assert len(output.token_ids) > 30
        stream.abort()


async def test_a_blocked_loop_is_woken_once_and_finds_everything() -> None:
    async with Rig(endless, step_seconds=0.001) as rig:
        streams = [await rig.engine.add_request("x", GenerationConfig(max_tokens=50)) for _ in range(4)]
        loop = counted(rig)
        while rig.metrics().num_requests_running + rig.metrics().num_requests_waiting:
            time.sleep(0.01)  # noqa: ASYNC251
        assert loop.wakeups <= 1
        for stream in streams:
            assert len((await stream).token_ids) == 50


async def test_a_step_wakes_the_loop_at_most_once() -> None:
    async with Rig(endless, max_num_sequence=16, step_seconds=0.001) as rig:
        adding = rig.engine.generate_many(["x"] * 16, GenerationConfig(max_tokens=100))
        async with adding:
            loop, steps = counted(rig), rig.model.steps
            async for _ in adding:
                pass
            assert 0 < loop.wakeups <= rig.model.steps - steps + 1


async def test_a_wakeup_serves_all_readers() -> None:
    async with Rig(endless, max_num_sequence=16) as rig:
        streams = [await rig.engine.add_request("x", GenerationConfig(max_tokens=200)) for _ in range(16)]
        await asyncio.gather(*(read(stream) for stream in streams))
        assert all(len(stream.result().token_ids) == 200 for stream in streams)
        assert rig.metrics().loop_wakeups < 2 * rig.model.steps + 40


async def test_an_abort_during_a_step_takes_effect_before_its_outputs() -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("x")
        stays = asyncio.create_task(rig.engine.add_request("y", GenerationConfig(max_tokens=3)))
        await asyncio.sleep(0)
        await rig.let(2)
        seen = await anext(stream)
        stream.abort()  # while the step is under way
        rig.model.release()
        outputs = await read(stream)
        assert [token for output in outputs for token in output.token_ids] == []
        assert outputs[-1].finish_reason is FinishReason.ABORT
        assert stream.result().token_ids == seen.token_ids
        assert stream.result().usage.completion_tokens == len(seen.token_ids)
        assert (await (await stays)).text == "abc"
        await rig.comes_to_rest()


async def test_an_abort_by_id_during_a_step_takes_effect_before_its_outputs() -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("x", None, RequestOptions(request_id="mine"))
        aborting = asyncio.create_task(rig.engine.abort_request("mine"))
        await asyncio.sleep(0)
        rig.model.release()
        await aborting
        assert stream.ended
        assert (await stream).token_ids == [*b"a"]
        await rig.comes_to_rest()


async def test_a_reply_does_not_wait_for_the_next_step() -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("x")
        adding = asyncio.create_task(rig.engine.add_request("y"))
        await asyncio.sleep(0)
        await rig.let()  # the step after it has begun, and is held
        other = await asyncio.wait_for(adding, 5.0)
        assert not other.ended
        rig.model.release()
        stream.abort()
        other.abort()


async def test_a_burst_of_requests() -> None:
    async with Rig(max_num_sequence=64, max_total_sequence_length=16384) as rig:
        begun = time.perf_counter()
        results = await asyncio.gather(*(rig.engine.generate(f"request {i}") for i in range(400)))
        assert [result.text for result in results] == [f"request {i}" for i in range(400)]
        assert time.perf_counter() - begun < 20.0
        await rig.comes_to_rest()


async def test_a_burst_is_admitted_before_the_next_step(rig: Rig) -> None:
    held = await rig.add_held("hello")
    adding = [asyncio.create_task(rig.engine.add_request("x")) for _ in range(300)]
    await asyncio.sleep(0)
    await rig.let()
    streams = await asyncio.gather(*adding)
    metrics = rig.metrics()
    assert metrics.num_requests_running + metrics.num_requests_waiting == 301
    rig.model.release()
    assert [(await stream).text for stream in streams] == ["x"] * 300
    assert (await held).text == "hello"


async def test_instructions_keep_their_order(rig: Rig) -> None:
    order: list[int] = []
    rig.model.note = order.append  # type: ignore[attr-defined]
    calls = []
    for i in range(300):
        calls.append(asyncio.create_task(rig.engine.debug_call_func_on_all_workers("note", i)))
        if i % 10 == 0:
            calls.append(asyncio.create_task(rig.engine.reset()))
        if i % 15 == 0:
            calls.append(asyncio.create_task(rig.engine.pause()))
            calls.append(asyncio.create_task(rig.engine.resume()))
    await asyncio.gather(*calls)
    assert order == list(range(300))


async def test_instructions_behind_a_reload_keep_their_order(rig: Rig) -> None:
    rig.loader.gate = threading.Event()
    states: list[EngineState] = []
    calls = [asyncio.create_task(rig.engine.reload(rig.config))]
    await asyncio.sleep(0)
    for call in (rig.engine.pause, rig.engine.resume, rig.engine.sleep, rig.engine.wake, rig.engine.unload):

        async def give(call: Callable[[], Any] = call) -> None:
            await call()
            states.append(rig.engine.state)

        calls.append(asyncio.create_task(give()))  # type: ignore[arg-type]
    await eventually(lambda: (rig.engine.health().loading or "").startswith("loading"))
    rig.loader.gate.set()
    await asyncio.gather(*calls)
    assert rig.engine.state is EngineState.UNLOADED
    assert len(states) == 5


async def test_a_slow_load_does_not_hold_up_the_loop(rig: Rig) -> None:
    load = rig.loader.load

    def slow(plan: Any) -> Any:
        time.sleep(0.2)
        return load(plan)

    rig.loader.load = slow  # type: ignore[method-assign]
    reloading = asyncio.create_task(rig.engine.reload(rig.config))
    turns = 0
    while not reloading.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 40


async def test_a_slow_reader_holds_up_nobody() -> None:
    async with Rig(endless, max_num_sequence=4) as rig:
        slow = await rig.engine.add_request("slow", GenerationConfig(max_tokens=500))
        fast = [await rig.engine.add_request("fast", GenerationConfig(max_tokens=500)) for _ in range(3)]
        await anext(slow)
        for stream in fast:
            assert len((await stream).token_ids) == 500
        await eventually(lambda: slow.ended)
        assert len((await slow).token_ids) == 500


async def test_a_reader_that_fails_holds_up_nobody() -> None:
    async with Rig(endless) as rig:

        async def fail(stream: RequestStream) -> None:
            async for _ in stream:
                raise ZeroDivisionError

        streams = [await rig.engine.add_request("x", GenerationConfig(max_tokens=100)) for _ in range(6)]
        readers = [asyncio.create_task(fail(stream) if i % 2 else read(stream)) for i, stream in enumerate(streams)]
        streams.clear()
        outcomes = await asyncio.gather(*readers, return_exceptions=True)
        assert [isinstance(outcome, ZeroDivisionError) for outcome in outcomes] == [False, True] * 3
        outcomes.clear()
        readers.clear()
        for _ in range(3):
            await asyncio.sleep(0)
        await rig.serves()


async def test_aborts_from_many_threads() -> None:
    async with Rig(endless) as rig:
        await rig.engine.pause()  # none may come to its end before the threads have started
        streams = [await rig.engine.add_request("x") for _ in range(20)]
        threads = [threading.Thread(target=stream.abort) for stream in streams for _ in range(5)]
        for thread in threads:
            thread.start()
        await rig.engine.resume()
        for stream in streams:
            assert (await stream).finish_reason is FinishReason.ABORT
        for thread in threads:
            thread.join()
        await rig.comes_to_rest()


def test_a_shutdown_while_another_thread_gives_the_first_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, starts, go_on = Rig(), threading.Event(), threading.Event()
    start = threading.Thread.start

    def slow(thread: threading.Thread) -> None:
        if thread.name == "asyncengine-step":
            starts.set()
            assert go_on.wait(10.0)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slow)

    def give() -> None:
        with suppress(EngineClosedError):  # the shutdown may be first in line
            rig.engine.reload_nowait()

    first = threading.Thread(target=give)
    first.start()
    assert starts.wait(10.0)
    second = threading.Timer(0.05, go_on.set)
    second.start()
    rig.engine.shutdown_nowait()
    assert not rig.engine._thread.alive
    first.join()
    second.join()


def test_a_shutdown_where_the_step_thread_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal's handler, which runs on the thread that it interrupts."""
    rig, start = Rig(), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "asyncengine-step":
            rig.engine.shutdown_nowait(timeout=5.0)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(EngineClosedError):
        rig.engine.reload_nowait()
    assert rig.engine.state is EngineState.CLOSED


def test_a_shutdown_where_the_step_thread_is_about_to_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal's handler again: what it interrupts starts the thread, so it cannot be waited for."""
    rig, start = Rig(), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name == "asyncengine-step":
            rig.engine.shutdown_nowait(timeout=5.0)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with suppress(EngineClosedError):  # the shutdown is first in line
        rig.engine.reload_nowait()
    rig.engine._thread.join(5.0)
    assert rig.engine.state is EngineState.CLOSED and not rig.engine._thread.alive


async def test_an_answer_that_nobody_waits_for_disturbs_nobody(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come when an instruction has just been given."""
    await rig.serves()
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    put = rig.engine._thread.put

    def interrupted(instruction: Any) -> None:
        put(instruction)
        raise KeyboardInterrupt

    monkeypatch.setattr(rig.engine._thread, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        await rig.engine.pause()
    monkeypatch.undo()
    await rig.engine.resume()
    assert (await rig.engine.generate("hello")).text == "hello"
    assert not reported
