"""`ManyStream`: many requests, read as one. Owned by the loop on which it is used."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Self

from asyncengine.errors import IllegalStateError
from asyncengine.loop.beginning import Beginning
from asyncengine.loop.stream import RequestStream
from asyncengine.outputs import RequestOutput, RequestResult


class _Ready:
    """Which of many streams have something to read. Does not know the streams, so that they can be dropped."""

    __slots__ = ("indices", "waiter")

    def __init__(self, count: int) -> None:
        self.indices = deque(range(count))
        self.waiter: asyncio.Future[None] | None = None

    def add(self, index: int) -> None:
        self.indices.append(index)
        self.wake()

    def wake(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class _Bell:
    """Stands where a reader's future would: rings for one of many streams, once until it is hung up again."""

    __slots__ = ("_index", "_ready", "_rung")

    def __init__(self, ready: _Ready, index: int) -> None:
        self._ready = ready
        self._index = index
        self._rung = True

    def hang(self) -> None:
        self._rung = False

    def done(self) -> bool:
        return self._rung

    def set_result(self, result: None, /) -> None:
        if not self._rung:
            self._rung = True
            self._ready.add(self._index)


class _Merged:
    """Many streams as one iterator of (index, delta)."""

    def __init__(self, streams: list[RequestStream]) -> None:
        self.streams = streams
        self._left = len(streams)
        self._ready = _Ready(len(streams))
        self._bells = [_Bell(self._ready, index) for index in range(len(streams))]

    async def next(self) -> tuple[int, RequestOutput]:
        ready = self._ready
        try:
            while self._left:
                if not ready.indices:
                    if ready.waiter is not None:
                        raise IllegalStateError("another task is reading these streams")
                    ready.waiter = future = asyncio.get_running_loop().create_future()
                    try:
                        await future
                    finally:
                        if ready.waiter is future:
                            ready.waiter = None
                    continue
                index = ready.indices[0]
                stream = self.streams[index]
                output = stream.take()
                if output is not None:
                    ready.indices.rotate(-1)  # the others have their turn first
                    return index, output
                if stream.ended:
                    self._left -= 1
                else:
                    stream.wait_with(self._bells[index])
                    self._bells[index].hang()
                ready.indices.popleft()
        except IllegalStateError:
            raise
        except BaseException:
            self.abort()
            raise
        raise StopAsyncIteration

    def abort(self) -> None:
        for stream in self.streams:
            stream.abort()

    async def aclose(self) -> None:
        self.abort()
        self._left = 0
        self._ready.wake()


class ManyStream:
    """Many requests, added by one instruction when it is first used, read as one stream of (index, delta).

    ``async for index, output in many`` yields deltas as they come, in no particular order between requests;
    ``await many`` reads all of them to the end and returns every `RequestResult`, in order. Leaving aborts all, as in
    `RequestStream`.

    A request that fails does not disturb the others: its last delta has a finish reason of "error" or "abort", and
    ``many.streams[index].error`` says more. ``await many`` raises the first such error once all have ended.
    """

    __slots__ = ("_beginning",)

    def __init__(self, add: Callable[[], Awaitable[list[RequestStream]]]) -> None:
        async def begin() -> _Merged:
            return _Merged(await add())

        self._beginning = Beginning(begin)

    @property
    def streams(self) -> list[RequestStream]:
        """One per prompt, once it has begun."""
        merged = self._beginning.begun
        return [] if merged is None else merged.streams

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        merged = self._beginning.begun
        if merged is None:
            merged = await self._beginning.to_read()
        return await merged.next()

    async def __aenter__(self) -> Self:
        await self._beginning.now()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._beginning.begun is not None:
            self._beginning.begun.abort()

    async def aclose(self) -> None:
        """Aborts all, also those that are about to be added, and ends the iteration for whoever reads."""
        await self._beginning.aclose()

    def __await__(self) -> Generator[Any, None, list[RequestResult]]:
        return self._results().__await__()

    async def _results(self) -> list[RequestResult]:
        merged = await self._beginning.now()
        async for _ in self:
            pass
        for stream in merged.streams:
            if stream.error is not None:
                raise stream.error
        return [stream.result() for stream in merged.streams]
