"""`LoopLag`: how late the event loop is, sampled while there is somebody to ask. Owned by the loop that served last."""

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
        self._series = 0  # a timer of another loop finds that it is of an older one, and rings no more
        self._until = 0.0

    @property
    def sampling(self) -> bool:
        """Whether the timer runs."""
        return self._loop is not None

    def keep_on(self) -> None:
        """Samples on the running loop for the next minute."""
        loop = asyncio.get_running_loop()
        self._until = time.perf_counter() + PATIENCE
        if self._loop is not loop:
            self._loop = loop
            self._series += 1
            self._set(loop, self._series)

    def observe(self, seconds: float) -> None:
        """Notes a sample that was taken otherwise."""
        self.seconds.observe(max(seconds, 0.0))

    def _set(self, loop: asyncio.AbstractEventLoop, series: int) -> None:
        loop.call_later(PERIOD, self._ring, loop, series, time.perf_counter() + PERIOD)

    def _ring(self, loop: asyncio.AbstractEventLoop, series: int, due: float) -> None:
        if series != self._series:
            return
        now = time.perf_counter()
        self.observe(now - due)
        if now < self._until:
            self._set(loop, series)
        else:
            self._loop = None
