"""`PendingStream`: a stream that begins when it is first used. Owned by the loop on which it is used."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Self

from asyncengine.loop.beginning import Beginning
from asyncengine.loop.delivery import Deltas
from asyncengine.loop.stream import RequestStream
from asyncengine.outputs import RequestOutput, RequestResult


class PendingStream:
    """A request that is added when it is first used. Dropped before that, nothing has happened.

    ``async with pending as stream`` adds the request and aborts it on leaving; ``async for output in pending``
    adds it and yields deltas; ``await pending`` adds it and returns the whole result. Errors, cancellation and
    everything else are as in `RequestStream`.
    """

    __slots__ = ("_beginning", "_deltas")

    def __init__(self, add: Callable[[], Awaitable[RequestStream]]) -> None:
        self._beginning = Beginning(add)
        self._deltas: Deltas | None = None  # of the stream, once it has begun

    @property
    def stream(self) -> RequestStream | None:
        """The stream, once it has begun."""
        return self._beginning.begun

    async def __aenter__(self) -> RequestStream:
        return await self._beginning.now()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.stream is not None:
            self.stream.abort()

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[RequestOutput]:
        # No coroutine of its own per delta: what the stream's reader gives is what is awaited.
        deltas = self._deltas
        return self._first() if deltas is None else deltas.__anext__()

    async def _first(self) -> RequestOutput:
        stream = await self._beginning.to_read()
        if self._deltas is None:
            self._deltas = aiter(stream)
        return await self._deltas.__anext__()

    async def aclose(self) -> None:
        """Aborts the request if it has begun or is about to, and ends the iteration for whoever reads."""
        await self._beginning.aclose()

    def __await__(self) -> Generator[Any, None, RequestResult]:
        return self._result().__await__()

    async def _result(self) -> RequestResult:
        return await (await self._beginning.now())
