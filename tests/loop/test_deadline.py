"""What comes before a request's admission is given up when a deadline passes, and when its caller leaves."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from harness import Rig, eventually

from asyncengine import DeadlineExceededError, Deadlines, EngineState, RequestOptions
from asyncengine.loop.deadline import in_time

FAR = RequestOptions(deadlines=Deadlines(total=60))


async def never() -> str:
    await asyncio.Event().wait()
    return "never"


async def at_once() -> str:
    return "at once"


@pytest.mark.parametrize("deadlines", [None, Deadlines(since=0), Deadlines(total=5, since=0)])
async def test_work_that_is_in_time_is_done(deadlines: Deadlines | None) -> None:
    assert await in_time(at_once(), deadlines, 1.0) == "at once"


@pytest.mark.parametrize("late", [0.0, 100.0])
async def test_the_first_deadline_is_named(late: float) -> None:
    deadlines = Deadlines(total=0.03, first_token=0.02, queue=5, since=0)
    with pytest.raises(DeadlineExceededError, match=r"not admitted yet: the first_token deadline of 0\.02 s passed"):
        await in_time(never(), deadlines, late)


async def test_an_error_is_the_work_s_own() -> None:
    async def fail() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own") as caught:
        await in_time(fail(), Deadlines(total=5, since=0), 1.0)
    assert type(caught.value) is TimeoutError


async def loading(rig: Rig) -> asyncio.Task[object]:
    """A reload that takes as long as the rig's gate is closed."""
    rig.loader.gate = threading.Event()
    await rig.engine.unload()
    reloading = asyncio.create_task(rig.engine.reload(rig.config))
    await eventually(lambda: rig.engine.state is EngineState.LOADING)
    return reloading


async def test_who_leaves_before_it_is_not_told_of_it(rig: Rig) -> None:
    reloading = await loading(rig)
    adding = asyncio.create_task(rig.engine.add_request("x", None, FAR))
    await asyncio.sleep(0)
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.02):
            await rig.engine.add_request("x", None, FAR)
    assert not isinstance(caught.value, DeadlineExceededError)
    pending = rig.engine.stream("x", None, FAR)
    reading = asyncio.create_task(anext(pending))
    await asyncio.sleep(0)
    await pending.aclose()
    with pytest.raises(StopAsyncIteration):
        await reading
    rig.loader.gate.set()  # type: ignore[union-attr]
    await reloading
    await rig.comes_to_rest()
    await rig.serves()


async def test_they_may_have_passed_long_before_the_call(rig: Rig) -> None:
    long_ago = RequestOptions(deadlines=Deadlines(total=1, since=time.perf_counter() - 100))
    with pytest.raises(DeadlineExceededError):
        await rig.engine.generate("x" * 5000, None, long_ago)
    with pytest.raises(DeadlineExceededError):
        await rig.engine.generate("x", None, long_ago)
    await rig.comes_to_rest()
