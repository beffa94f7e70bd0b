"""Which deadline passes next. Owned by the step thread."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator
from typing import Literal

from asyncengine.instructions import Deadlines

Kind = Literal["queue", "first_token", "total"]
"""The fields of `Deadlines`."""
_KINDS: tuple[Kind, ...] = ("queue", "first_token", "total")


class DeadlineQueue:
    """Deadlines of requests, the soonest first. Those of requests that have ended are passed over.

    Args:
        alive: Numbers of the requests that have not ended.

    Attributes:
        soonest: Nothing passes before it, in seconds of the clock; infinite where there are none.
    """

    __slots__ = ("_alive", "_heap", "soonest")

    def __init__(self, alive: Collection[int]) -> None:
        self._alive = alive
        self._heap: list[tuple[float, int, Kind]] = []
        self.soonest = math.inf

    def add(self, number: int, deadlines: Deadlines, now: float) -> None:
        """Adds those of a request that was admitted now."""
        for kind in _KINDS:
            seconds = getattr(deadlines, kind)
            if seconds is not None:
                heapq.heappush(self._heap, (now + seconds, number, kind))
        if len(self._heap) > 64 + 6 * len(self._alive):  # most are of requests that have ended
            self._heap = [entry for entry in self._heap if entry[1] in self._alive]
            heapq.heapify(self._heap)
        self._look()

    @property
    def next(self) -> float | None:
        """When the next one passes, in seconds of the clock."""
        while self._heap and self._heap[0][1] not in self._alive:
            heapq.heappop(self._heap)
        self._look()
        return self.soonest if self._heap else None

    def passed(self, now: float) -> Iterator[tuple[int, Kind]]:
        """Takes out those that have passed: whose, and which. Requests may end meanwhile."""
        while self._heap and self._heap[0][0] <= now:
            _, number, kind = heapq.heappop(self._heap)
            self._look()
            if number in self._alive:
                yield number, kind

    def _look(self) -> None:
        self.soonest = self._heap[0][0] if self._heap else math.inf
