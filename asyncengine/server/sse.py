"""Server-sent events, and what follows from a client's leaving: whoever works for it is cancelled at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import TypeVar

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from asyncengine.server.wire import encode

T = TypeVar("T")

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def data(value: object) -> bytes:
    """One event without a name."""
    return b"data: " + encode(value) + b"\n\n"


def named(name: str, value: object) -> bytes:
    """One event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + encode(value) + b"\n\n"


class EventStream(Response):
    """A response that sends events as they come, and a comment where none has come for a while.

    When the client leaves, the generator is cancelled where it waits: the request that it reads ends within a step.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None, ping_seconds: float = 15.0
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._ping_seconds = ping_seconds
        self._quiet = True
        self._pinging: anyio.Event | None = None  # while a ping is on its way
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        async with aclosing(self._events) as events, anyio.create_task_group() as tasks:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            tasks.start_soon(self._watch, receive, send, tasks.cancel_scope)
            async for event in events:
                self._quiet = False
                if self._pinging is not None:
                    await self._pinging.wait()
                await send({"type": "http.response.body", "body": event, "more_body": True})
            if self._pinging is not None:
                await self._pinging.wait()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            tasks.cancel_scope.cancel()

    async def _watch(self, receive: Receive, send: Send, scope: anyio.CancelScope) -> None:
        """Cancels `scope` when the client has left; pings meanwhile."""
        while True:
            with anyio.move_on_after(self._ping_seconds):
                await _gone(receive)
                scope.cancel()
                return
            if self._quiet:  # so nothing is being sent
                self._pinging = pinged = anyio.Event()
                await send({"type": "http.response.body", "body": PING, "more_body": True})
                self._pinging = None
                pinged.set()
            self._quiet = True


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None if the client left before there was one: `work` is cancelled then."""
    outcome: list[T] = []
    failure: Exception | None = None

    async def watch(scope: anyio.CancelScope) -> None:
        await _gone(receive)
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch, tasks.cancel_scope)
        try:
            outcome.append(await work)
        except Exception as error:
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # which would hold this frame, and be held by it
    return outcome[0] if outcome else None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
