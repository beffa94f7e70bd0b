"""Which deadline passes next. Owned by the step thread."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Sequence

from asyncengine.instructions import Deadlines


class DeadlineQueue:
    """Deadlines of requests, the soonest first. Those of requests that have ended are passed over.

    Args:
        alive: Numbers of the requests that have not ended, in several collections.

    Attributes:
        soonest: Nothing passes before it, in seconds of the clock; infinite where there are none.
    """

    __slots__ = ("_alive", "_heap", "soonest")

    def __init__(self, alive: Sequence[Collection[int]]) -> None:
        self._alive = alive
        self._heap: list[tuple[float, int, str]] = []
        self.soonest = math.inf

    def add(self, number: int, deadlines: Deadlines) -> None:
        """Adds those of a request; they have begun."""
        for when, kind in deadlines.ends():
            heapq.heappush(self._heap, (when, number, kind))
        if len(self._heap) > 64 + 6 * sum(map(len, self._alive)):  # most are of requests that have ended
            self._heap = [entry for entry in self._heap if self._lives(entry[1])]
            heapq.heapify(self._heap)
        self._look()

    @property
    def next(self) -> float | None:
        """When the next one passes, in seconds of the clock."""
        while self._heap and not self._lives(self._heap[0][1]):
            heapq.heappop(self._heap)
        self._look()
        return self.soonest if self._heap else None

    def passed(self, now: float) -> Iterator[tuple[int, str]]:
        """Takes out those that have passed: whose, and which. Requests may end meanwhile."""
        while self._heap and self._heap[0][0] <= now:
            _, number, kind = heapq.heappop(self._heap)
            self._look()
            if self._lives(number):
                yield number, kind

    def _lives(self, number: int) -> bool:
        return any(number in some for some in self._alive)

    def _look(self) -> None:
        self.soonest = self._heap[0][0] if self._heap else math.inf
