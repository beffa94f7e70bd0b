"""One transcript, by whichever model is there. Owned by the loop on which it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from asyncengine.errors import InvalidRequestError
from asyncengine.loop.deadline import in_time
from asyncengine.loop.hearing import Hearing, Reloaded
from asyncengine.loop.in_order import Tell
from asyncengine.loop.transcript_requests import Add, Asked, TranscriptRequests
from asyncengine.outputs import Transcript
from asyncengine.step.model import ModelView


class Transcription:
    """The work for one transcript. Nothing of it is done before `run`.

    Args:
        add: Adds requests.
        see: What is loaded, once something is.
        asked: What is wanted.
        clock: Seconds of the deadlines' clock.
        running: Transcripts that have a name, by it.

    Attributes:
        asked: As given.
    """

    def __init__(
        self,
        add: Add,
        see: Callable[[], Awaitable[ModelView]],
        asked: Asked,
        clock: Callable[[], float],
        running: dict[str, Transcription],
    ) -> None:
        self._see, self._clock, self._running = see, clock, running
        self._requests = TranscriptRequests(add)
        self.asked = asked

    def abort(self) -> None:
        """Ends its requests, and begins no others. Idempotent; from any thread."""
        self._requests.abort()

    async def aborted(self) -> None:
        """Aborts it, on any loop, and waits until those of its requests that were being added were told."""
        self.abort()
        for added in self._requests.adding:
            await asyncio.shield(asyncio.wrap_future(added))

    async def run(self, tell: Tell | None, begun: Callable[[], None] | None = None) -> Transcript:
        """What is said in the audio. With another model it begins anew, or ends where some of it was told.

        Args:
            tell: Told all of it, as it comes, in its order. None: nobody is.
            begun: Called when its first request was admitted.

        Raises:
            InvalidRequestError: There is one of that name.
            AsyncEngineError: As `AsyncEngine.transcribe`.

        Cancelling it aborts the requests.
        """
        self._requests.on_begun = begun
        name = self.asked.options.request_id
        if name is None:
            return await self._by_any_model(tell)
        if self._running.setdefault(name, self) is not self:
            raise InvalidRequestError(f"request_id {name!r} is that of a transcript that has not ended")
        try:
            return await self._by_any_model(tell)
        finally:
            del self._running[name]

    async def _by_any_model(self, tell: Tell | None) -> Transcript:
        while True:
            try:
                view = await in_time(self._see(), self.asked.options.deadlines, self._clock())
                return await Hearing(self._requests, self.asked, self._clock, view, tell).transcript()
            except Reloaded:
                continue
