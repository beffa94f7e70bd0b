"""What begins when it is first used, once. Owned by the loop on which it is used."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from asyncengine.errors import IllegalStateError
from asyncengine.loop.interruption import Interruption


class Closable(Protocol):
    """What may begin."""

    async def aclose(self) -> None:
        """Ends it."""
        ...


T = TypeVar("T", bound=Closable)


class Beginning(Generic[T]):
    """Begins something for whoever is first to use it, unless it was closed before.

    Args:
        begin: What begins it. It is cancelled if it is closed meanwhile.

    Attributes:
        begun: What has begun; None until then.
        closed: Whether it was closed, begun or not.
    """

    __slots__ = ("_begin", "_interruption", "_under_way", "begun", "closed")

    def __init__(self, begin: Callable[[], Awaitable[T]]) -> None:
        self._begin = begin
        self._under_way = False
        self._interruption: Interruption | None = None
        self.begun: T | None = None
        self.closed = False

    async def now(self) -> T:
        """What has begun, by now.

        Raises:
            IllegalStateError: Another task is about to begin it, or it is closed before it has begun.
        """
        begun = await self._unless_closed()
        if begun is None:
            raise _closed()
        return begun

    async def to_read(self) -> T:
        """The same for an iterator, which ends where that is closed.

        Raises:
            StopAsyncIteration: It is closed before it has begun.
            IllegalStateError: Another task is about to begin it.
        """
        if self.begun is None and self.closed:
            raise StopAsyncIteration
        begun = await self._unless_closed()
        if begun is None:
            raise StopAsyncIteration
        return begun

    async def aclose(self) -> None:
        """Closes what has begun or is about to."""
        self.closed = True
        if self._interruption is not None:  # it may be long in coming
            self._interruption.interrupt()
        if self.begun is not None:
            await self.begun.aclose()

    async def _unless_closed(self) -> T | None:
        if self.begun is None:
            self._check()
            self._under_way = True
            try:
                with Interruption() as self._interruption:
                    self.begun = await self._begin()
            finally:
                self._under_way, self._interruption = False, None
            if self.closed and self.begun is not None:  # by another task, meanwhile
                await self.begun.aclose()
        return self.begun

    def _check(self) -> None:
        if self._under_way:
            raise IllegalStateError("another task is about to read this stream")
        if self.closed:
            raise _closed()


def _closed() -> IllegalStateError:
    return IllegalStateError("this stream was closed before it began")
