"""`TranscriptStream`: what is said in an audio, as its reader sees it. Owned by the loop on which it is used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Self

from asyncengine.errors import IllegalStateError
from asyncengine.loop.transcribing import Transcription
from asyncengine.outputs import Transcript, TranscriptDelta


class _Told:
    """What was told and not read yet. Does not know the stream, so that it can be dropped."""

    __slots__ = ("begun", "deltas", "ended", "error", "transcript", "waiter")

    def __init__(self) -> None:
        self.begun = False
        self.deltas: list[TranscriptDelta] = []
        self.waiter: asyncio.Future[None] | None = None
        self.ended = False
        self.error: BaseException | None = None
        self.transcript: Transcript | None = None

    def begin(self) -> None:
        self.begun = True
        self.wake()

    def add(self, delta: TranscriptDelta) -> None:
        self.deltas.append(delta)
        self.wake()

    def take(self) -> TranscriptDelta | None:
        deltas, self.deltas = self.deltas, []
        if len(deltas) <= 1:
            return deltas[0] if deltas else None
        return TranscriptDelta(
            "".join(delta.text for delta in deltas), tuple(part for delta in deltas for part in delta.segments)
        )

    def wake(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def fill(self, transcription: Transcription) -> None:
        """Does the work, in a task of its own."""
        try:
            self.transcript = await transcription.run(self.add, self.begin)
        except BaseException as error:
            self.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            self.ended = True
            self.wake()


class TranscriptStream:
    """What is said in an audio, three ways: an async iterator of deltas, an async context manager, an awaitable.

    ``await stream`` returns the whole `Transcript`. ``async for delta in stream`` yields a `TranscriptDelta` as soon as
    something is certain, in the order of the audio; a reader that lags gets fewer and larger ones. ``async with
    stream`` waits until its first request is admitted, and ends it on leaving. It begins when it is first used; dropped
    before that, nothing has happened.

    Leaving is aborting: cancelling the task that reads or awaits, `aclose`, leaving ``async with``, or dropping the
    last reference ends its requests. `CancelledError` is never swallowed. After `abort`, what was written down can
    still be read, and the transcript has the finish reason "abort".

    One task reads at a time. Awaited, all is done in the task that awaits; while it is iterated over, in a task that
    belongs to the stream and ends with it, so that the pieces of a long audio go on while its reader is busy.
    """

    __slots__ = ("__weakref__", "_closed", "_loop", "_made", "_raised", "_task", "_told", "_transcription", "_waits")

    def __init__(self, make: Callable[[], Transcription]) -> None:
        self._made = make
        self._transcription: Transcription | None = None
        self._told = _Told()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._raised = False
        self._waits = False

    @property
    def transcript(self) -> Transcript | None:
        """All of it, once it has ended."""
        return self._told.transcript

    def abort(self) -> None:
        """Ends it with reason "abort". Idempotent; from any thread."""
        self._closed = self._closed or self._transcription is None
        if self._transcription is not None:
            self._transcription.abort()

    async def aclose(self) -> None:
        """Ends it, and the iteration for whoever reads."""
        self._leave()
        if asyncio.get_running_loop() is self._loop:  # elsewhere, the reader is woken by the end of the work
            self._told.wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TranscriptDelta:
        """Returns the next delta.

        Raises:
            StopAsyncIteration: There is nothing more.
            AsyncEngineError: Once, behind the last delta, if it ended by an error.
            IllegalStateError: Another task reads it, or awaits it, or it began on another event loop.
        """
        if not self._closed:
            self._begin()
        told = self._told
        while not self._closed:
            if (delta := told.take()) is not None:
                return delta
            if told.ended:
                break
            await self._news()
        self._raise_error()
        raise StopAsyncIteration

    async def _news(self) -> None:
        """Waits until there is some."""
        if self._waits:  # or was woken, and has not come to it
            raise IllegalStateError("another task is reading this transcript")
        self._told.waiter = waiter = asyncio.get_running_loop().create_future()
        self._waits = True
        try:
            await waiter
        except BaseException:
            self._told.waiter = None
            self._leave()
            raise
        finally:
            self._waits = False

    def _raise_error(self) -> None:
        if self._told.error is not None and not self._raised and not self._closed:
            self._raised = True
            raise self._told.error

    def __await__(self) -> Generator[Any, None, Transcript]:
        return self._whole().__await__()

    async def _whole(self) -> Transcript:
        if self._transcription is None and not self._closed:
            self._transcription, self._loop = self._made(), asyncio.get_running_loop()
            try:
                self._told.transcript = await self._transcription.run(None)
            except BaseException as error:
                self._told.error = error
                raise
            finally:
                self._told.ended = True
        elif self._task is not None:
            async for _ in self:
                pass
        if (found := self._told.transcript) is None:
            raise IllegalStateError("this transcript was left before its end, or another task awaits it")
        return found

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        if self._transcription is None:
            self._transcription, self._loop = self._made(), loop
            self._task = loop.create_task(self._told.fill(self._transcription))
        elif self._loop is not loop:
            raise IllegalStateError("this transcript began on another event loop; read it there")
        elif self._task is None and not self._told.ended:
            raise IllegalStateError("another task awaits this transcript")

    async def __aenter__(self) -> Self:
        """Returns once its first request is admitted.

        Raises:
            AsyncEngineError: It ended before, by an error.
            IllegalStateError: As `__anext__`.
        """
        if not self._closed:
            self._begin()
        while not (self._closed or self._told.begun or self._told.ended):
            await self._news()
        if not self._told.begun:
            self._raise_error()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        """Ends it for good: its requests at once, whatever is done besides as soon as its loop comes to it."""
        self._closed = True
        if self._transcription is not None and not self._told.ended:
            self._transcription.abort()
            if self._task is not None and self._loop is not None:
                if _running_loop() is self._loop:
                    self._task.cancel()
                else:
                    with contextlib.suppress(RuntimeError):  # the loop is closed
                        self._loop.call_soon_threadsafe(self._task.cancel)

    def __del__(self) -> None:
        # May run on any thread, in the middle of anything.
        self._leave()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
