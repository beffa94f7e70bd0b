"""A model that is warmed up while its engine is idle: what requests, instructions and readers see of that."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator

import pytest
from harness import Rig, eventually

from asyncengine import EngineState, StepError, WarmUp

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def warming() -> AsyncIterator[Rig]:
    """An engine whose first piece is being held."""
    rig = Rig()
    rig.loader.warm_up_pieces = 3
    rig.loader.hold_warm_ups = True
    async with rig:
        await held(rig)
        yield rig


async def held(rig: Rig) -> None:
    """Returns once a piece is being held."""
    assert await asyncio.to_thread(rig.loader.warm_ups[-1].wait_until_held), "no piece has begun"


async def finished(rig: Rig) -> None:
    await eventually(lambda: not rig.engine.health().warm_up.goes_on)


async def test_an_idle_engine_warms_its_model_up_and_then_sleeps() -> None:
    rig = Rig()
    rig.loader.warm_up_pieces = 5
    async with rig:
        assert rig.engine.state is EngineState.READY
        assert rig.metrics().warm_up_pieces == 5
        await finished(rig)
        assert rig.engine.health().warm_up == WarmUp(5, 5, False)
        assert rig.metrics().warm_up_pieces_done == 5
        thread = rig.engine._thread._thread
        assert thread is not None and thread.ident is not None
        if hasattr(time, "pthread_getcpuclockid"):
            clock = time.pthread_getcpuclockid(thread.ident)
            before = time.clock_gettime(clock)
            await asyncio.sleep(0.3)
            assert time.clock_gettime(clock) - before < 0.002


async def test_a_request_waits_for_one_piece_and_no_other_begins_before_it_is_served(warming: Rig) -> None:
    asking = asyncio.create_task(warming.engine.generate("hello"))
    await eventually(lambda: len(warming.engine._thread.queue))
    warming.loader.warm_ups[-1].let()
    assert (await asking).text == "hello"
    assert warming.metrics().warm_up_pieces_done == 1
    await held(warming)  # and then they go on


async def test_a_piece_under_way_shows_as_a_step_that_runs(warming: Rig) -> None:
    health = warming.engine.health()
    assert health.ok and health.step_running_seconds > 0
    assert health.warm_up == WarmUp(0, 3, True)


@pytest.mark.parametrize("call", ["unload", "sleep", "pause", "shutdown", "reload"])
async def test_instructions_wait_for_one_piece_and_end_it(warming: Rig, call: str) -> None:
    warm_up = warming.loader.warm_ups[-1]
    method = getattr(warming.engine, call)
    calling = asyncio.create_task(method(warming.config) if call == "reload" else method())
    await eventually(lambda: len(warming.engine._thread.queue))
    warm_up.let()
    await calling
    assert warm_up.warmth.done == 1
    if call == "reload":
        await held(warming)  # of the new model
        assert warming.loader.warm_ups[-1] is not warm_up


async def test_a_warm_up_that_fails_is_told_and_the_engine_serves_on(warming: Rig) -> None:
    warm_up = warming.loader.warm_ups[-1]
    warm_up.fail_next(MemoryError("no room"))
    warm_up.let()
    await finished(warming)
    health = warming.engine.health()
    assert health.ok and health.notes == ("the model's warm-up failed and goes no further: MemoryError('no room')",)
    assert (await warming.engine.generate("hello")).text == "hello"


@pytest.mark.loops("either")
async def test_what_was_warmed_up_is_let_go_with_its_model(warming: Rig) -> None:
    warm_up = warming.loader.warm_ups.pop()
    gone = weakref.ref(warm_up)
    warm_up.fail_next(StepError("no"))
    warm_up.let()
    await finished(warming)
    await warming.engine.unload()
    assert warming.engine.health().warm_up == WarmUp(0, 0, False)
    del warm_up
    gc.collect()
    assert gone() is None
