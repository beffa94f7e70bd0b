"""The crossing from the step thread to one event loop: events, with at most one wake-up of the loop per step.

Written by the step thread, read on the loop. A wake-up is skipped while one is pending, so a loop that lags is not
flooded: it finds all that has happened since in one go.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Protocol

from asyncengine.events import Event


class Loop(Protocol):
    """All that is asked of an event loop."""

    def call_soon_threadsafe(self, callback: Callable[[], object], /) -> object:
        """As `asyncio.AbstractEventLoop`."""
        ...

    def is_closed(self) -> bool:
        """As `asyncio.AbstractEventLoop`."""
        ...


class StreamBack:
    """Events on their way to one event loop.

    Attributes:
        handoff_seconds: How long the newest wake-up took to reach the loop.
        handoff_max_seconds: The longest so far.
    """

    __slots__ = (
        "_deliver", "_events", "_loop", "_pending", "_posted_at", "_wake",
        "handoff_max_seconds", "handoff_seconds", "wakeups",
    )  # fmt: skip

    def __init__(self, loop: Loop, deliver: Callable[[Event], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._events: deque[Event] = deque()
        self._pending = False
        self._posted_at = 0.0
        self.handoff_seconds = 0.0
        self.handoff_max_seconds = 0.0
        self.wakeups = 0
        self._wake = self._new_wake()

    def post(self, events: list[Event]) -> bool:
        """Hands events over. Any thread but usually the step thread; never blocks.

        Returns:
            False if the loop is closed: nobody will read them.
        """
        self._events.extend(events)
        if self._pending:
            if self._loop.is_closed():
                self._events.clear()
                return False
            return True
        self._pending = True
        self._posted_at = time.perf_counter()
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            self._events.clear()
            return False
        return True

    def make_sure(self) -> None:
        """Wakes the loop once more if a wake-up is pending. On the loop, by whoever is about to wait for an event.

        A program that runs its loop without a runner may get KeyboardInterrupt anywhere, also where asyncio has taken a
        wake-up and not yet called it; the loop would never be woken again.
        """
        if self._pending:
            self._loop.call_soon_threadsafe(self._wake)

    def _new_wake(self) -> Callable[[], object]:
        drains = self._drains()
        next(drains)
        return functools.partial(next, drains, None)

    def _drains(self) -> Generator[None, None, None]:
        """Delivers what there is when it is resumed, once.

        A generator, because a Ctrl-C that comes while the loop waits in native code, as uvloop does, is raised in the
        first line of Python that the loop calls next. That is often this one, and is within the ``try``.
        """
        try:
            yield
            self._wake = self._new_wake()  # whoever hears of a delivery may run the loop once more within it
            self._drain()
        except GeneratorExit:
            pass
        except BaseException:
            self._wake = self._new_wake()
            if self._pending or self._events:  # the others must not wait for the next step
                self._loop.call_soon_threadsafe(self._wake)
            raise

    def _drain(self) -> None:
        if self._pending:
            # Cleared first: whatever is appended after this line brings a wake-up of its own.
            self._pending = False
            self.wakeups += 1
            self.handoff_seconds = seconds = time.perf_counter() - self._posted_at
            if seconds > self.handoff_max_seconds:
                self.handoff_max_seconds = seconds
        events, deliver = self._events, self._deliver
        for _ in range(len(events)):
            if not events:  # a delivery has run the loop once more
                break
            deliver(events.popleft())
