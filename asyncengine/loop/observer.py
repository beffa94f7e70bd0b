"""Who is told when requests begin and end: a protocol, so that the engine knows no library of traces."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from asyncengine.generation import GenerationConfig
from asyncengine.outputs import FinishReason, Usage

Operation = Literal["chat", "text_completion", "embeddings", "classification"]


@dataclass(frozen=True, slots=True)
class RequestBegun:
    """A request that is being given to the engine.

    Attributes:
        model: What was loaded.
        prompt_tokens: Length of its prompt.
        config: As the caller gave it.
        adapter: What it is computed with; None is the model alone.
    """

    request_id: str
    operation: Operation
    model: str
    prompt_tokens: int
    config: GenerationConfig
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOver:
    """The end of a request.

    Attributes:
        finish_reasons: One per branch.
        usage: None of a request that was withdrawn before it was admitted, or refused.
        error: What its reader gets raised.
    """

    finish_reasons: tuple[FinishReason, ...]
    usage: Usage | None
    error: BaseException | None


class RequestObserver(Protocol):
    """Told on the event loop, in the context of the task that adds the request.

    What it raises is reported to the event loop's exception handler; the request goes on as if nobody watched.
    """

    def begin(self, begun: RequestBegun) -> Callable[[RequestOver], None]:
        """Notes that a request begins; returns what is called, once, when it is over."""
        ...

    def within(self, headers: Mapping[str, str]) -> AbstractContextManager[object]:
        """A context in which requests belong to whoever sent these HTTP headers."""
        ...


def begin(observer: RequestObserver, begun: RequestBegun) -> Callable[[RequestOver], None] | None:
    """Tells an observer that a request begins; returns what tells it of the end. Neither raises."""
    loop = asyncio.get_running_loop()

    def report(error: Exception) -> None:
        loop.call_exception_handler({"message": f"the observer of {begun.request_id} failed", "exception": error})

    try:
        tell = observer.begin(begun)
    except Exception as error:
        report(error)
        return None
    context = contextvars.copy_context()  # what ends a request, ends it in no task's context

    def on_over(over: RequestOver) -> None:
        try:
            context.run(tell, over)
        except Exception as error:
            report(error)

    return on_over
