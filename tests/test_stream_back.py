from __future__ import annotations

import _thread
import asyncio
import operator
import threading
from collections.abc import Callable

import pytest

from asyncengine.events import Event, Reply
from asyncengine.stream_back import StreamBack


class Loop:
    """An event loop that runs its callbacks when the test says so."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], object]] = []
        self.closed = False

    def call_soon_threadsafe(self, callback: Callable[[], object], /) -> object:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.callbacks.append(callback)
        return None

    def is_closed(self) -> bool:
        return self.closed

    def run(self) -> None:
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback()


def events(*tickets: int) -> list[Event]:
    return [Reply(ticket) for ticket in tickets]


def test_events_arrive_in_order() -> None:
    loop, got = Loop(), []
    back = StreamBack(loop, got.append)
    assert back.post(events(1, 2))
    assert back.post(events(3))
    assert got == []
    loop.run()
    assert got == events(1, 2, 3)


def test_at_most_one_wake_up_is_pending() -> None:
    loop, got = Loop(), []
    back = StreamBack(loop, got.append)
    for ticket in range(10):
        back.post(events(ticket))
    assert len(loop.callbacks) == 1
    loop.run()
    assert back.wakeups == 1
    back.post(events(99))
    assert len(loop.callbacks) == 1
    loop.run()
    assert back.wakeups == 2 and len(got) == 11


def test_a_closed_loop_is_reported() -> None:
    loop, got = Loop(), []
    back = StreamBack(loop, got.append)
    loop.closed = True
    assert back.post(events(1)) is False
    assert back.post(events(2)) is False
    assert got == []


def test_a_loop_that_closes_with_a_wake_up_pending_is_reported() -> None:
    loop = Loop()
    back = StreamBack(loop, lambda event: None)
    assert back.post(events(1)) is True
    loop.closed = True
    assert back.post(events(2)) is False


@pytest.mark.parametrize("pending", [False, True])
def test_nothing_is_kept_for_a_closed_loop(pending: bool) -> None:
    loop = Loop()
    back = StreamBack(loop, lambda event: None)
    if pending:
        back.post(events(1))
    loop.closed = True
    for ticket in range(100):
        back.post(events(ticket))
    assert not back._events


def test_a_failed_delivery_does_not_lose_later_events() -> None:
    loop, got = Loop(), []

    def deliver(event: Event) -> None:
        if event == Reply(2):
            raise KeyError("a defect")
        got.append(event)

    back = StreamBack(loop, deliver)
    back.post(events(1, 2, 3, 4))
    with pytest.raises(KeyError):
        loop.run()
    loop.run()
    assert got == events(1, 3, 4)
    assert not loop.callbacks


def test_a_failed_delivery_of_the_last_event_wakes_nobody() -> None:
    loop = Loop()
    back = StreamBack(loop, lambda event: 1 / 0)  # type: ignore[arg-type]
    back.post(events(1))
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert not loop.callbacks


def test_events_posted_during_a_delivery_bring_their_own_wake_up() -> None:
    loop, got = Loop(), []

    def deliver(event: Event) -> None:
        got.append(event)
        if event == Reply(1):
            back.post(events(2))

    back = StreamBack(loop, deliver)
    back.post(events(1))
    loop.run()
    assert got == events(1)
    loop.run()
    assert got == events(1, 2)


def test_a_delivery_that_runs_the_loop_once_more_loses_nothing() -> None:
    """As an observer in a notebook, whose loops are patched to nest, or a debugger."""
    loop, got = Loop(), []

    def deliver(event: Event) -> None:
        got.append(event)
        if event == Reply(1):
            back.post(events(3))
            loop.run()

    back = StreamBack(loop, deliver)
    back.post(events(1, 2))
    loop.run()
    assert got == events(1, 2, 3)
    back.post(events(4))
    loop.run()
    assert got == events(1, 2, 3, 4)


def test_a_wake_up_that_was_lost_is_made_up_for() -> None:
    """As by a KeyboardInterrupt before the first line of the delivery."""
    loop, got = Loop(), []
    back = StreamBack(loop, got.append)
    back.post(events(1))
    loop.callbacks.clear()
    back.make_sure()
    back.post(events(2))
    loop.run()
    assert got == events(1, 2)
    assert back.wakeups == 1
    back.make_sure()
    assert loop.callbacks == []  # nothing is pending


def test_an_interrupt_that_is_raised_as_the_delivery_begins_loses_nothing() -> None:
    """As by Ctrl-C while a loop waits in native code: the first line of Python that it calls raises."""
    loop, got = Loop(), []
    back = StreamBack(loop, got.append)
    back.post(events(1, 2))
    back.make_sure()
    callbacks, loop.callbacks = loop.callbacks, []
    with pytest.raises(KeyboardInterrupt):
        list(map(operator.call, [_thread.interrupt_main, callbacks[0]]))  # no Python in between
    assert got == []
    loop.run()
    assert got == events(1, 2)
    callbacks[1]()
    back.post(events(3))
    loop.run()
    assert got == events(1, 2, 3)


def test_the_hand_over_is_timed() -> None:
    loop = Loop()
    back = StreamBack(loop, lambda event: None)
    back.post(events(1))
    loop.run()
    assert 0 <= back.handoff_seconds == back.handoff_max_seconds


def test_events_of_a_thread_all_reach_a_real_loop() -> None:
    got: list[Event] = []

    async def receive() -> None:
        done = asyncio.Event()

        def deliver(event: Event) -> None:
            got.append(event)
            if event == Reply(4999):
                done.set()

        back = StreamBack(asyncio.get_running_loop(), deliver)
        thread = threading.Thread(target=lambda: [back.post(events(ticket)) for ticket in range(5000)])
        thread.start()
        await asyncio.wait_for(done.wait(), 60)
        thread.join()
        assert back.wakeups <= 5000

    asyncio.run(receive())
    assert got == events(*range(5000))
