"""What has come for one branch of a request. Owned by one event loop."""

from __future__ import annotations

from typing import Protocol

from asyncengine.detokenizer import TextStream
from asyncengine.outputs import FinishReason
from asyncengine.step.batch import TokenLogprobs


class Waiter(Protocol):
    """Whoever waits for an inbox: a future, or something that looks like one."""

    def done(self) -> bool:
        """As `asyncio.Future`."""
        ...

    def set_result(self, result: None, /) -> None:
        """As `asyncio.Future`."""
        ...


class Branch:
    """What has come for one branch. The router appends to the record; the reader remembers how far it has read.

    Attributes:
        streaming: Whether nothing but tokens has come, so that a reader need not look for anything else.
        ids: Every token so far.
        logprobs: One entry per token, if they were asked for; else None.
        read: Tokens that the reader has had.
        text: Decodes what the reader takes, if text was asked for.
        texts: What it has decoded.
        score: As in `BranchResult`.
        finished: Whether the reader has had the finish reason.
        waiter: Woken, once, when something comes.
    """

    __slots__ = (
        "finish_reason", "finished", "ids", "logprobs", "read", "score", "stop_reason", "streaming", "text", "texts",
        "waiter",
    )  # fmt: skip

    def __init__(self, text: TextStream | None = None, logprobs: bool = False) -> None:
        self.streaming = True
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = [] if logprobs else None
        self.read = 0
        self.text = text
        self.texts: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.score: float | None = None
        self.finished = False
        self.waiter: Waiter | None = None
