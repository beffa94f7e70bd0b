"""Streams that begin when they are used, and many requests read as one. Owned by the loop on which they are used."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Self

from asyncengine.errors import IllegalStateError
from asyncengine.loop.delivery import Deltas
from asyncengine.loop.interruption import Interruption
from asyncengine.loop.stream import RequestStream
from asyncengine.outputs import RequestOutput, RequestResult


class PendingStream:
    """A request that is added when it is first used. Dropped before that, nothing has happened.

    ``async with pending as stream`` adds the request and aborts it on leaving; ``async for output in pending``
    adds it and yields deltas; ``await pending`` adds it and returns the whole result. Errors, cancellation and
    everything else are as in `RequestStream`.
    """

    __slots__ = ("_add", "_beginning", "_closed", "_deltas", "_interruption", "_stream")

    def __init__(self, add: Callable[[], Awaitable[RequestStream]]) -> None:
        self._add = add
        self._beginning = False
        self._closed = False
        self._interruption: Interruption | None = None
        self._stream: RequestStream | None = None
        self._deltas: Deltas | None = None  # of the stream, once it has begun

    async def _begin(self) -> RequestStream:
        stream = await self._begin_unless_closed()
        if stream is None:
            _check_unbegun(False, self._closed)
        assert stream is not None
        return stream

    async def _begin_unless_closed(self) -> RequestStream | None:
        if self._stream is None:
            _check_unbegun(self._beginning, self._closed)
            self._beginning = True
            try:
                with Interruption() as self._interruption:
                    self._stream = await self._add()
            finally:
                self._beginning, self._interruption = False, None
            if self._closed and self._stream is not None:  # by another task, meanwhile
                await self._stream.aclose()
        return self._stream

    @property
    def stream(self) -> RequestStream | None:
        """The stream, once it has begun."""
        return self._stream

    async def __aenter__(self) -> RequestStream:
        return await self._begin()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.abort()

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[RequestOutput]:
        # No coroutine of its own per delta: what the stream's reader gives is what is awaited.
        deltas = self._deltas
        return self._first() if deltas is None else deltas.__anext__()

    async def _first(self) -> RequestOutput:
        if self._stream is None:
            if self._closed:
                raise StopAsyncIteration
            if await self._begin_unless_closed() is None:
                raise StopAsyncIteration
        assert self._stream is not None
        if self._deltas is None:
            self._deltas = aiter(self._stream)
        return await self._deltas.__anext__()

    async def aclose(self) -> None:
        """Aborts the request if it has begun or is about to, and ends the iteration for whoever reads."""
        self._closed = True
        if self._interruption is not None:  # its prompt may be long in coming
            self._interruption.interrupt()
        if self._stream is not None:
            await self._stream.aclose()

    def __await__(self) -> Generator[Any, None, RequestResult]:
        return self._result().__await__()

    async def _result(self) -> RequestResult:
        return await (await self._begin())


def _check_unbegun(beginning: bool, closed: bool) -> None:
    if beginning:
        raise IllegalStateError("another task is about to read this stream")
    if closed:
        raise IllegalStateError("this stream was closed before it began")


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

    def close(self) -> None:
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

    __slots__ = ("_add", "_beginning", "_closed", "_interruption", "_merged")

    def __init__(self, add: Callable[[], Awaitable[list[RequestStream]]]) -> None:
        self._add = add
        self._beginning = False
        self._closed = False
        self._interruption: Interruption | None = None
        self._merged: _Merged | None = None

    @property
    def streams(self) -> list[RequestStream]:
        """One per prompt, once it has begun."""
        return [] if self._merged is None else self._merged.streams

    async def _begin(self) -> _Merged:
        merged = await self._begin_unless_closed()
        if merged is None:
            _check_unbegun(False, self._closed)
        assert merged is not None
        return merged

    async def _begin_unless_closed(self) -> _Merged | None:
        if self._merged is None:
            _check_unbegun(self._beginning, self._closed)
            self._beginning = True
            try:
                with Interruption() as self._interruption:
                    self._merged = _Merged(await self._add())
            finally:
                self._beginning, self._interruption = False, None
            if self._closed and self._merged is not None:  # by another task, meanwhile
                self._merged.close()
        return self._merged

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        merged = self._merged
        if merged is None and (self._closed or (merged := await self._begin_unless_closed()) is None):
            raise StopAsyncIteration
        return await merged.next()

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._merged is not None:
            self._merged.abort()

    async def aclose(self) -> None:
        """Aborts all, also those that are about to be added, and ends the iteration for whoever reads."""
        self._closed = True
        if self._interruption is not None:
            self._interruption.interrupt()
        if self._merged is not None:
            self._merged.close()

    def __await__(self) -> Generator[Any, None, list[RequestResult]]:
        return self._results().__await__()

    async def _results(self) -> list[RequestResult]:
        merged = await self._begin()
        async for _ in self:
            pass
        for stream in merged.streams:
            if stream.error is not None:
                raise stream.error
        return [stream.result() for stream in merged.streams]
