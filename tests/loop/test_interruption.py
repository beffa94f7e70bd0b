"""A block that others may end: once, and without taking anybody else's cancellation for theirs."""

from __future__ import annotations

import asyncio

import pytest

from asyncengine.loop.interruption import Interruption


async def interrupted(block: list[Interruption], cleanup: int = 0) -> str:
    """Waits in a block that is put into the list, cleaning up for a number of turns; returns how it ended."""
    with Interruption() as interruption:
        block.append(interruption)
        try:
            await asyncio.sleep(3600)
        finally:
            for _ in range(cleanup):
                await asyncio.sleep(0)
    await asyncio.sleep(0)
    return "interrupted"


async def begun(cleanup: int = 0) -> tuple[asyncio.Task[str], Interruption]:
    block: list[Interruption] = []
    task = asyncio.create_task(interrupted(block, cleanup))
    await asyncio.sleep(0)
    return task, block[0]


async def test_what_cleans_up_may_await() -> None:
    task, interruption = await begun(cleanup=5)
    for _ in range(3):
        interruption.interrupt()
        await asyncio.sleep(0)
    assert await task == "interrupted"
    assert task.cancelling() == 0


async def test_a_cancellation_goes_on() -> None:
    task, _ = await begun()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("turns", range(3))
@pytest.mark.parametrize("cancelled_first", [False, True])
async def test_a_cancellation_beside_an_interruption_goes_on(cancelled_first: bool, turns: int) -> None:
    task, interruption = await begun(cleanup=5)
    acts = [interruption.interrupt, task.cancel]
    for act in reversed(acts) if cancelled_first else acts:
        act()
        for _ in range(turns):
            await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1


async def test_a_time_out_around_it_is_told_from_it() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await interrupted([])


async def test_one_within_the_other() -> None:
    with Interruption() as outer:
        with Interruption() as inner:
            inner.interrupt()
            outer.interrupt()
            await asyncio.sleep(3600)
        raise AssertionError("both were interrupted")
    await asyncio.sleep(0)


async def test_a_block_that_interrupts_itself_and_does_not_wait_is_past() -> None:
    with Interruption() as interruption:
        interruption.interrupt()
    for _ in range(3):
        await asyncio.sleep(0)
    interruption.interrupt()
    await asyncio.sleep(0)


async def test_an_error_of_the_block_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        with Interruption() as interruption:
            interruption.interrupt()
            try:
                await asyncio.sleep(3600)
            finally:
                raise ZeroDivisionError


async def test_from_another_thread() -> None:
    task, interruption = await begun()
    await asyncio.to_thread(interruption.interrupt)
    assert await asyncio.wait_for(task, 10.0) == "interrupted"
