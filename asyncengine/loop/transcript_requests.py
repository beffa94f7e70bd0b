"""The requests that come of one transcript. Owned by the loop on which it runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol

from asyncengine.fallback import TranscriptionFallback
from asyncengine.generation import GenerationConfig
from asyncengine.loop.encoding import AnyPrompt
from asyncengine.loop.prepare import RequestOptions
from asyncengine.loop.stream import RequestStream
from asyncengine.outputs import RequestResult, Usage
from asyncengine.step.model import ModelView
from asyncengine.transcription import TranscriptionPrompt

Configured = Callable[[ModelView], GenerationConfig]


class Add(Protocol):
    """As `AsyncEngine._add`."""

    def __call__(
        self, prompts: Sequence[AnyPrompt], configs: Sequence[Configured], options: RequestOptions
    ) -> Coroutine[Any, Any, list[RequestStream]]:
        """Adds requests, and returns their streams."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """What a transcript is asked for.

    Attributes:
        prompt: Of all of the audio.
        config: How to generate.
        options: Id, priority, deadlines, which have begun, of each request that comes of it.
        fallback: What is written down anew; None takes what comes.
    """

    prompt: TranscriptionPrompt
    config: GenerationConfig
    options: RequestOptions
    fallback: TranscriptionFallback | None


class Aborted(Exception):
    """Somebody wanted the transcript to end before its request was added."""


class TranscriptRequests:
    """Those under way.

    Args:
        add: Adds them.

    Attributes:
        aborted: Whether somebody wanted the transcript to end.
        on_begun: Called once the first is admitted.
    """

    def __init__(self, add: Add) -> None:
        self._add = add
        self._streams: dict[int, RequestStream] = {}
        self._adding: dict[asyncio.Task[list[RequestStream]], Future[None]] = {}
        self.aborted = False
        self.on_begun: Callable[[], None] | None = None

    def abort(self) -> None:
        """Ends them, and those that are being added. Idempotent; from any thread."""
        self.aborted = True
        for stream in list(self._streams.values()):
            stream.abort()
        for adding in list(self._adding):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                adding.get_loop().call_soon_threadsafe(adding.cancel)

    @property
    def adding(self) -> list[Future[None]]:
        """Of each request that is being added, what is done once it was, or once it was given up."""
        return list(self._adding.values())

    async def add(self, prompt: AnyPrompt, config: Configured, options: RequestOptions) -> RequestStream:
        """A request, which ends if the transcript does.

        Raises:
            Aborted: It did meanwhile.
        """
        before = _times_cancelled()
        adding = asyncio.create_task(self._add([prompt], [config], options))
        added: Future[None] = Future()
        self._adding[adding] = added
        try:
            [stream] = await adding
        except asyncio.CancelledError:
            if adding.done() and not adding.cancelled() and adding.exception() is None:
                for stream in adding.result():  # who waited was cancelled before it could take it
                    stream.abort()
            if self.aborted and _times_cancelled() == before:
                raise Aborted from None
            raise
        else:
            self._streams[stream.number] = stream
            if self.aborted:
                stream.abort()
        finally:
            del self._adding[adding]
            added.set_result(None)
        on_begun, self.on_begun = self.on_begun, None
        if on_begun is not None:
            on_begun()
        return stream

    async def result(self, stream: RequestStream, each: Callable[[str, list[int]], None]) -> RequestResult:
        """What comes of a request, of whose first branch the text and tokens of each delta are handed on."""
        try:
            async for output in stream:
                if output.index == 0:
                    each(output.text, output.token_ids)
            return stream.result()
        finally:
            del self._streams[stream.number]


def followed(options: RequestOptions) -> RequestOptions:
    """Options of requests behind the first: they wait for their turn, since what goes on is not given up for others."""
    deadlines = options.deadlines
    if deadlines is not None:
        deadlines = replace(deadlines, queue=None, first_token=None)
    return replace(options, when_full="wait", deadlines=deadlines)


def together(usages: Sequence[Usage], seconds: float) -> Usage:
    """What requests cost together; times are those until the first ran, until it wrote, and until now.

    Args:
        usages: Of each, in their order.
        seconds: Until now.
    """
    if len(usages) <= 1:
        return usages[0] if usages else Usage(0, 0)
    counts = ("prompt_tokens", "completion_tokens", "cached_tokens", "audio_tokens", "preemptions",
              "draft_tokens", "accepted_draft_tokens")  # fmt: skip
    return Usage(
        **{name: sum(getattr(usage, name) for usage in usages) for name in counts},
        queue_seconds=usages[0].queue_seconds,
        first_token_seconds=usages[0].first_token_seconds,
        total_seconds=seconds,
    )


def _times_cancelled() -> int:
    """How often somebody has cancelled the task that runs."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()
