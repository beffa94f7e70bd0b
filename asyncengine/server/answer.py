"""What the routes that generate have in common: running one request or several, and saying how a branch ended."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from asyncengine.loop.many import ManyStream
from asyncengine.loop.stream import RequestStream
from asyncengine.outputs import FinishReason, RequestOutput, Usage
from asyncengine.server.chunks import UsageRecord, usage_of
from asyncengine.server.naming import fresh_id
from asyncengine.server.refusal import Refusal
from asyncengine.server.service import Service

_CUT = (FinishReason.ABORT, FinishReason.ERROR)


def new_id(prefix: str) -> str:
    """An id for a response; the engine knows the request by it too."""
    return f"{prefix}-{fresh_id()}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


@dataclass(frozen=True, slots=True)
class Answer:
    """Requests that were admitted for one HTTP request.

    Attributes:
        streams: One per prompt.
        service: Whose.
    """

    streams: Sequence[RequestStream]
    service: Service
    merged: ManyStream | None = None

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Deltas, each with the index of its prompt, until all have ended. Leaving ends the requests.

        Raises:
            AsyncEngineError: A request ended by an error.
            Refusal: A request was ended by somebody else.
        """
        cut = False  # why, is known at the end
        async with AsyncExitStack() as stack:
            for stream in self.streams:
                await stack.enter_async_context(stream)
            if self.merged is None:
                async for output in self.streams[0]:
                    if output.finish_reason in _CUT:
                        cut, output = True, output._replace(finish_reason=None)
                    yield 0, output
            else:
                async for index, output in self.merged:
                    if output.finish_reason in _CUT:
                        cut, output = True, output._replace(finish_reason=None)
                    yield index, output
        for stream in self.streams:
            if stream.error is not None:
                raise stream.error
        if cut:
            raise Refusal(503, "the request was aborted before its end", "request_aborted", None, {"retry-after": "1"})
        for usage in self.usages():
            self.service.traffic.observe(usage)

    def usages(self) -> list[Usage]:
        """What the requests that have ended cost."""
        return [stream.usage for stream in self.streams if stream.usage is not None]

    def usage(self) -> UsageRecord:
        """What all of it cost."""
        config = self.service.engine.complete_engine_config
        return usage_of(self.usages(), config is not None and config.speculative_mode != "disable")

    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(stream.prompt_token_ids) for stream in self.streams)
