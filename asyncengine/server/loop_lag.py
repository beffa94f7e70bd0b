"""`LoopLag`: how late the event loop is, sampled while there is somebody to ask. Owned by the loop that serves."""

from __future__ import annotations

import asyncio
import time

from asyncengine.metrics import Histogram

PERIOD = 0.05
"""Seconds between two samples."""
PATIENCE = 60.0
"""Seconds without a request after which sampling stops, so that nothing wakes an idle process for ever."""


class LoopLag:
    """A timer that notes by how much it came late.

    Attributes:
        seconds: What was found so far.
    """

    def __init__(self) -> None:
        self.seconds = Histogram()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._until = 0.0

    @property
    def sampling(self) -> bool:
        """Whether the timer runs."""
        return self._timer is not None

    def keep_on(self) -> None:
        """Samples on the running loop for the next minute."""
        loop = asyncio.get_running_loop()
        self._until = time.perf_counter() + PATIENCE
        if self._timer is None or self._loop is not loop:
            if self._timer is not None:
                self._timer.cancel()  # of a loop that is closed, or serves no longer
            self._loop = loop
            self._set()

    def observe(self, seconds: float) -> None:
        """Notes a sample that was taken otherwise."""
        self.seconds.observe(max(seconds, 0.0))

    def _set(self) -> None:
        assert self._loop is not None
        self._due = time.perf_counter() + PERIOD
        self._timer = self._loop.call_later(PERIOD, self._ring)

    def _ring(self) -> None:
        now = time.perf_counter()
        self.observe(now - self._due)
        if now < self._until:
            self._set()
        else:
            self._loop = self._timer = None
