"""The crossing from the event loops to the step thread: instructions, drained whole between steps.

Owned by both sides; lock-free until it is closed, so that a `put` is safe from any thread, from a finalizer, and from
a garbage collection that happens to run inside another `put`. Everything rests on two facts of CPython: `deque.append`
and `deque.popleft` are atomic, and so is releasing a lock that serves as a one-shot flag.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from asyncengine.errors import EngineClosedError

T = TypeVar("T")

LONGEST_WAIT = 3600.0
"""Seconds after which `InstructionQueue.wait` returns early: a lock refuses very long time-outs."""


class InstructionQueue(Generic[T]):
    """Many producers, one consumer. An idle consumer sleeps in `wait` without using the CPU."""

    __slots__ = ("_closed", "_closing", "_flag", "_items", "_sleeping", "_why")

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._flag = threading.Lock()
        self._flag.acquire()
        self._sleeping = False
        self._closed = False
        self._why = "the engine was shut down"
        self._closing = threading.RLock()  # a finalizer may call `put` while `close` holds it

    def put(self, item: T) -> None:
        """Adds an instruction. Never blocks; safe from any thread.

        Raises:
            EngineClosedError: Nobody will ever take it.
        """
        if self._closed:
            raise EngineClosedError(self._why)
        self._items.append(item)
        if self._sleeping:
            self.wake()
        if self.closed:
            # The consumer closed meanwhile. Either its last drain took the item, then it is answered there; or not.
            with self._closing:
                missed = any(other is item for other in list(self._items))
            if missed:
                raise EngineClosedError(self._why)

    def wake(self) -> None:
        """Ends the consumer's present or next `wait`. Idempotent."""
        try:
            self._flag.release()
        except RuntimeError:
            pass  # already set

    def drain(self) -> list[T]:
        """Takes all that is there, oldest first. Consumer only."""
        items = []
        popleft = self._items.popleft
        try:
            while True:
                items.append(popleft())
        except IndexError:
            return items

    def wait(self, timeout: float | None = None) -> None:
        """Sleeps until something is there, `wake` is called, or `timeout` seconds passed. Consumer only.

        May return early; the caller looks again.
        """
        self._sleeping = True
        # A producer that appended before it could see _sleeping is noticed here; one that appends later sees it.
        if not self._items:
            self._flag.acquire(timeout=-1 if timeout is None else min(max(timeout, 0.0), LONGEST_WAIT))
        self._sleeping = False

    def close(self) -> list[T]:
        """Refuses whatever comes from now on and returns what was still there. Consumer only; idempotent."""
        with self._closing:
            if self._closed:
                return []
            self._closed = True
            return self.drain()

    def abandon(self, why: str) -> None:
        """Refuses whatever comes from now on. In a process in which there is no consumer any more."""
        self._why = why
        self._closed = True

    @property
    def closed(self) -> bool:
        """Whether `put` raises."""
        return self._closed

    def __len__(self) -> int:
        return len(self._items)
