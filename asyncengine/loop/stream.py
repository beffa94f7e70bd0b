"""`RequestStream`: one request's output, as its reader sees it. Owned by the loop on which the request was added."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Self

from asyncengine.detokenizer import TextStream
from asyncengine.errors import IllegalStateError
from asyncengine.loop.router import Branch, Inbox, Router, Waiter
from asyncengine.outputs import BranchResult, FinishReason, RequestOutput, RequestResult, Usage
from asyncengine.step.batch import TokenLogprobs

_new = tuple.__new__
"""Makes a named tuple without the keyword handling of its own constructor."""


class _BranchText:
    """What a reader has had of one branch so far."""

    __slots__ = ("ids", "logprobs", "text", "texts")

    def __init__(self, text: TextStream | None, logprobs: bool) -> None:
        self.text = text
        self.texts: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = [] if logprobs else None


class RequestStream:
    """One request, three ways: an async iterator of deltas, an async context manager, an awaitable of the result.

    ``async for output in stream`` yields a `RequestOutput` per delta; a reader that lags gets fewer and larger ones.
    ``await stream`` reads to the end and returns the whole `RequestResult`. ``async with stream`` aborts on leaving.

    Leaving is aborting: cancelling the task that reads, `aclose`, leaving ``async with``, or dropping the last
    reference ends the request. `CancelledError` is never swallowed. After `abort`, what was generated can still be
    read.

    One task reads at a time.

    Attributes:
        request_id: Names the request in `AsyncEngine.abort_request`.
        label: Whatever the caller gave; the engine does not look at it.
    """

    __slots__ = (
        "__weakref__", "_abort", "_branches", "_closed", "_inbox", "_next", "_raised", "_router", "_tokens_of",
        "label", "request_id",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        inbox: Inbox,
        router: Router,
        abort: Callable[[int], None],
        texts: list[TextStream] | None,
        logprobs: bool,
        label: object = None,
    ) -> None:
        self.request_id = request_id
        self.label = label
        self._inbox = inbox
        self._router = router
        self._abort = abort
        self._closed = False
        self._raised = False
        self._next = 0  # the branch to look at first, so that each has its turn
        # The one branch of a request that asked for neither text nor logprobs nor several branches.
        self._tokens_of = inbox.branches[0] if texts is None and not logprobs and len(inbox.branches) == 1 else None
        self._branches = [
            _BranchText(None if texts is None else texts[index], logprobs) for index in range(len(inbox.branches))
        ]

    @property
    def usage(self) -> Usage | None:
        """Token counts and timings; None until the request has ended."""
        return self._inbox.usage

    @property
    def ended(self) -> bool:
        """Whether the request has ended; there may still be something to read."""
        return self._inbox.ended

    @property
    def error(self) -> BaseException | None:
        """What the request ended by, if not in an ordinary way."""
        return self._inbox.error

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """One entry per token of the prompt, the first None; what there is so far. None if not asked for."""
        return self._inbox.prompt_logprobs

    def abort(self) -> None:
        """Ends the request with reason "abort"; its blocks are free within a step. Idempotent; from any thread."""
        if not self._inbox.ended:
            self._abort(self._inbox.number)

    def withdraw(self) -> None:
        """Aborts a request that its caller never came to own; nothing of it is delivered."""
        self.abort()
        self._router.forget(self._inbox.number)
        self._inbox.ended = True

    async def aclose(self) -> None:
        """Aborts, and ends the iteration for whoever reads."""
        self._closed = True
        self.abort()
        if asyncio.get_running_loop() is self._router.loop:  # elsewhere, the reader is woken by the request's end
            self._inbox.wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        """Returns the next delta.

        Raises:
            StopAsyncIteration: There is nothing more.
            AsyncEngineError: Once, after the last delta, if the request ended by an error or a deadline.
            IllegalStateError: Another task reads already, or the request was added on another event loop.
        """
        inbox, only = self._inbox, self._tokens_of
        try:
            while not self._closed:
                if only is not None and only.finish_reason is None and not inbox.ended:
                    # The way of nearly every delta of a request for tokens alone: as little as can be done.
                    if only.ids:
                        ids, only.ids = only.ids, []
                        self._branches[0].ids += ids
                        if len(ids) > 1:
                            self._router.merged += len(ids) - 1
                        return _new(RequestOutput, ("", ids, None, 0, None, None))
                elif (output := self.take()) is not None:
                    return output
                elif inbox.ended:
                    if inbox.error is not None and not self._raised:
                        self._raised = True
                        raise inbox.error
                    raise StopAsyncIteration
                if inbox.waiter is not None:
                    raise IllegalStateError(f"request {self.request_id}: another task is reading this stream")
                loop = asyncio.get_running_loop()
                if loop is not self._router.loop:
                    self._running_loop()
                inbox.waiter = future = loop.create_future()
                try:
                    await future
                finally:
                    if inbox.waiter is future:
                        inbox.waiter = None
        except (StopAsyncIteration, IllegalStateError):
            raise
        except BaseException:
            self.abort()
            raise
        raise StopAsyncIteration

    def take(self) -> RequestOutput | None:
        """Takes a pending delta without waiting; None if there is none just now."""
        branches, index = self._inbox.branches, self._next
        for _ in branches:
            branch = branches[index]
            following = index + 1 if index + 1 < len(branches) else 0
            if branch.ids or (branch.finish_reason is not None and not branch.finished):
                self._next = following
                return self._take(branch, index)
            index = following
        return None

    def wait_with(self, waiter: Waiter) -> None:
        """Wakes `waiter` when something comes.

        Raises:
            IllegalStateError: Another task waits already, or the request was added on another event loop.
        """
        if self._inbox.waiter is not None:
            raise IllegalStateError(f"request {self.request_id}: another task is reading this stream")
        self._running_loop()
        self._inbox.waiter = waiter

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if loop is not self._router.loop:
            raise IllegalStateError(f"request {self.request_id} was added on another event loop; read it there")
        return loop

    def _take(self, branch: Branch, index: int) -> RequestOutput:
        seen = self._branches[index]
        ids, branch.ids = branch.ids, []
        self._router.merged += max(len(ids) - 1, 0)
        finish_reason, stop_reason = branch.finish_reason, branch.stop_reason
        logprobs = None
        if seen.logprobs is not None:
            logprobs, branch.logprobs = branch.logprobs, []
            seen.logprobs += logprobs
        text = ""
        if seen.text is not None:
            # A stop token is part of the tokens, not of the text.
            text = seen.text.push(ids[:-1] if type(stop_reason) is int else ids)
            if finish_reason is not None:
                text += seen.text.flush()
            seen.texts.append(text)
        seen.ids += ids
        if finish_reason is not None:
            branch.finished = True
        return RequestOutput(text, ids, logprobs, index, finish_reason, stop_reason)

    def __await__(self) -> Generator[Any, None, RequestResult]:
        return self._result().__await__()

    async def _result(self) -> RequestResult:
        async for _ in self:
            pass
        return self.result()

    def result(self) -> RequestResult:
        """What has been read of a request that has ended and was read to its end.

        Raises:
            IllegalStateError: It was not.
        """
        pairs = list(zip(self._inbox.branches, self._branches, strict=True))
        if self._inbox.usage is None or not all(branch.finished for branch, _ in pairs):
            raise IllegalStateError(f"request {self.request_id} has not been read to its end")
        outputs = [
            BranchResult(
                text="".join(seen.texts),
                token_ids=seen.ids,
                logprobs=seen.logprobs,
                index=index,
                finish_reason=branch.finish_reason or FinishReason.ABORT,
                stop_reason=branch.stop_reason,
            )
            for index, (branch, seen) in enumerate(pairs)
        ]
        prompt, logprobs = self._inbox.prompt, self._inbox.prompt_logprobs
        return RequestResult(
            self.request_id, outputs, self._inbox.usage, None if prompt is None else prompt.tolist(), logprobs
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        # May run on any thread, in the middle of anything: both calls only append to a deque or pop from a dict.
        if not self._inbox.ended:
            self._abort(self._inbox.number)
            self._router.forget(self._inbox.number)
