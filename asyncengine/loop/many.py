"""Streams that begin when they are used, and many requests read as one. Owned by the loop on which they are used."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Self

from asyncengine.loop.stream import RequestStream
from asyncengine.outputs import RequestOutput, RequestResult


class PendingStream:
    """A request that is added when it is first used. Dropped before that, nothing has happened.

    ``async with pending as stream`` adds the request and aborts it on leaving; ``async for output in pending``
    adds it and yields deltas; ``await pending`` adds it and returns the whole result. Errors, cancellation and
    everything else are as in `RequestStream`.
    """

    __slots__ = ("_add", "_stream")

    def __init__(self, add: Callable[[], Awaitable[RequestStream]]) -> None:
        self._add = add
        self._stream: RequestStream | None = None

    async def _begin(self) -> RequestStream:
        if self._stream is None:
            self._stream = await self._add()
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

    async def __anext__(self) -> RequestOutput:
        stream = self._stream
        if stream is None:
            stream = await self._begin()
        return await stream.__anext__()

    async def aclose(self) -> None:
        """Aborts the request if it has begun."""
        if self._stream is not None:
            await self._stream.aclose()

    def __await__(self) -> Generator[Any, None, RequestResult]:
        return self._result().__await__()

    async def _result(self) -> RequestResult:
        return await (await self._begin())


class _Ready:
    """Which of many streams have something to read. Does not know the streams, so that they can be dropped."""

    __slots__ = ("indices", "waiter")

    def __init__(self, count: int) -> None:
        self.indices = deque(range(count))
        self.waiter: asyncio.Future[None] | None = None

    def add(self, index: int) -> None:
        self.indices.append(index)
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class _Bell:
    """Stands where a reader's future would: rings for one of many streams."""

    __slots__ = ("_index", "_ready")

    def __init__(self, ready: _Ready, index: int) -> None:
        self._ready = ready
        self._index = index

    def done(self) -> bool:
        return False

    def set_result(self, result: None, /) -> None:
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
                    ready.waiter = asyncio.get_running_loop().create_future()
                    await ready.waiter
                index = ready.indices.popleft()
                stream = self.streams[index]
                output = stream.take()
                if output is None:
                    if stream.ended:
                        self._left -= 1
                    else:
                        stream.wait_with(self._bells[index])
                    continue
                ready.indices.append(index)
                return index, output
        except BaseException:
            self.abort()
            raise
        raise StopAsyncIteration

    def abort(self) -> None:
        for stream in self.streams:
            stream.abort()


class ManyStream:
    """Many requests, added by one instruction when it is first used, read as one stream of (index, delta).

    ``async for index, output in many`` yields deltas as they come, in no particular order between requests;
    ``await many`` reads all of them to the end and returns every `RequestResult`, in order. Leaving aborts all, as in
    `RequestStream`.

    A request that fails does not disturb the others: its last delta has a finish reason of "error" or "abort", and
    ``many.streams[index].error`` says more. ``await many`` raises the first such error once all have ended.
    """

    __slots__ = ("_add", "_merged")

    def __init__(self, add: Callable[[], Awaitable[list[RequestStream]]]) -> None:
        self._add = add
        self._merged: _Merged | None = None

    @property
    def streams(self) -> list[RequestStream]:
        """One per prompt, once it has begun."""
        return [] if self._merged is None else self._merged.streams

    async def _begin(self) -> _Merged:
        if self._merged is None:
            self._merged = _Merged(await self._add())
        return self._merged

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        return await (self._merged or await self._begin()).next()

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Aborts all."""
        if self._merged is not None:
            self._merged.abort()

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
