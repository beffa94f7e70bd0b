"""`RequestStream`: one request's output, as its reader sees it. Owned by the loop on which the request was added."""

from __future__ import annotations

from asyncio import get_running_loop
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Self

from asyncengine.classifier import Classifier
from asyncengine.detokenizer import BEFORE
from asyncengine.errors import IllegalStateError
from asyncengine.loop import delivery
from asyncengine.loop.branch import Branch, Waiter
from asyncengine.loop.router import Inbox, Router
from asyncengine.outputs import BranchResult, FinishReason, RequestOutput, RequestResult, Usage
from asyncengine.step.batch import NO_TOKENS, Float32, Int32, TokenLogprobs

_new = tuple.__new__
"""Makes a named tuple without the keyword handling of its own constructor."""


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
        prompt_token_ids: (tokens,) the prompt as the model sees it; where its decoder attends to a source beside its
            own tokens, the same token stands for each of those.
    """

    __slots__ = (
        "__weakref__", "_abort", "_closed", "_create_future", "_inbox", "_only", "_raised", "_router", "_turn", "label",
        "prompt_token_ids", "request_id",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        inbox: Inbox,
        router: Router,
        abort: Callable[[int], None],
        label: object = None,
        prompt_token_ids: Int32 | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = NO_TOKENS if prompt_token_ids is None else prompt_token_ids
        self.label = label
        self._inbox = inbox
        self._router = router
        self._create_future = router.loop.create_future
        self._abort = abort
        self._closed = False
        self._raised = False
        self._turn = 0  # the branch to look at first, so that each has its turn
        only = inbox.branches[0] if len(inbox.branches) == 1 else None
        # The one branch of a request that asked for tokens and nothing else.
        self._only = None if only is None or only.text is not None or only.logprobs is not None else only

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

    @property
    def pooled(self) -> Float32 | None:
        """The prompt's hidden states, pooled, (hidden,), of a request for an embedding, once they are there."""
        return self._inbox.pooled

    @property
    def attention(self) -> tuple[Float32, ...] | None:
        """How much tokens attend to an audio, (heads, tokens, frames) one behind the other, of a request for an
        alignment, once it is there.
        """
        return self._inbox.attention

    @property
    def classifier(self) -> Classifier | None:
        """The classification head of the model that made `pooled`, of a request that is for it."""
        return self._inbox.classifier

    def abort(self) -> None:
        """Ends the request with reason "abort"; its blocks are free within a step. Idempotent; from any thread."""
        if not self._inbox.ended:
            self._abort(self._inbox.number)

    @property
    def number(self) -> int:
        """The engine's own name of the request."""
        return self._inbox.number

    def prompt_is(self, token_ids: Int32) -> None:
        """Notes a prompt that had not come whole when the request was added."""
        self.prompt_token_ids = token_ids
        if self._inbox.prompt is not None:
            self._inbox.prompt = token_ids
        before = token_ids[-BEFORE:].tolist()
        for branch in self._inbox.branches:
            if branch.text is not None:
                branch.text.begin_behind(before)

    def withdraw(self) -> None:
        """Aborts a request that its caller never came to own; nothing of it is delivered."""
        self.abort()
        self._router.forget(self._inbox.number)
        self._inbox.end()

    async def aclose(self) -> None:
        """Aborts, and ends the iteration for whoever reads."""
        self._closed = True
        for branch in self._inbox.branches:
            branch.streaming = False
        self.abort()
        if get_running_loop() is self._router.loop:  # elsewhere, the reader is woken by the request's end
            self._inbox.wake()

    def __aiter__(self) -> delivery.Deltas:
        # The compiled iterator reads the same inbox as `__anext__`, and leaves to this class whatever is rare.
        reader = delivery.reader_type
        return self if reader is None else reader(self, self._only, self._create_future)

    async def __anext__(self) -> RequestOutput:
        """Returns the next delta.

        Raises:
            StopAsyncIteration: There is nothing more.
            AsyncEngineError: Once, after the last delta, if the request ended by an error or a deadline.
            IllegalStateError: Another task reads already, or the request was added on another event loop.
        """
        branch = self._only
        if branch is None or not branch.streaming:
            return await self._next()
        # The way of nearly every delta of a request for tokens alone: as little as can be done.
        ids, start = branch.ids, branch.read
        if len(ids) == start:
            if branch.waiter is not None:
                self._check_reader()
            branch.waiter = future = self._create_future()
            try:
                await future
            except BaseException as error:
                self._leave(future, error)
                raise
            start = branch.read
            if not branch.streaming or len(ids) == start:
                return await self._next()
        branch.read = end = len(ids)
        if end - start == 1:
            return _new(RequestOutput, ("", [ids[start]], None, 0, None, None))
        self._router.merged += end - start - 1
        return _new(RequestOutput, ("", ids[start:], None, 0, None, None))

    async def _next(self) -> RequestOutput:
        while (output := self._next_now()) is None:
            future = self._create_future()
            self.wait_with(future)
            try:
                await future
            except BaseException as error:
                self._leave(future, error)
                raise
        return output

    def _next_now(self) -> RequestOutput | None:
        """What `__anext__` returns or raises, if it can tell without waiting; else None."""
        if self._closed:
            raise StopAsyncIteration
        try:
            output = self.take()
        except BaseException:  # out of the tokenizer
            self.abort()
            raise
        if output is None and self._inbox.ended:
            if self._inbox.error is not None and not self._raised:
                self._raised = True
                raise self._inbox.error
            raise StopAsyncIteration
        return output

    def _note_merged(self, count: int) -> None:
        """Counts tokens that were added to a delta nobody had read yet."""
        self._router.merged += count

    def take(self) -> RequestOutput | None:
        """Takes a pending delta without waiting; None if there is none just now."""
        branches, index = self._inbox.branches, self._turn
        for _ in branches:
            branch = branches[index]
            following = index + 1 if index + 1 < len(branches) else 0
            if branch.read < len(branch.ids) or (branch.finish_reason is not None and not branch.finished):
                self._turn = following
                return self._take(branch, index)
            index = following
        return None

    def wait_with(self, waiter: Waiter) -> None:
        """Wakes `waiter` when something comes.

        Raises:
            IllegalStateError: Another task waits already, or the request was added on another event loop.
        """
        self._check_reader()
        self._inbox.expect(waiter)

    def _leave(self, future: Waiter, error: BaseException | None) -> None:
        """Notes that the reader was cancelled or closed, or sits on a loop on which it can never be woken.

        Args:
            future: What it waited for.
            error: What was raised in it instead; None if it was closed.
        """
        awaited = any(branch.waiter is future for branch in self._inbox.branches)
        if awaited:
            self._inbox.expect(None)
        try:
            self._check_loop()
            if awaited and not future.done():
                future.set_result(None)  # another task may wait for it, by the same compiled reader
        except IllegalStateError:
            if isinstance(error, RuntimeError):  # a task there cannot wait for it
                raise
        except RuntimeError:
            pass  # no loop runs here: the reader is closed from outside, as by the end of its loop or the collector
        self.abort()

    def _check_reader(self) -> None:
        self._check_loop()
        if self._inbox.has_reader:
            raise IllegalStateError(f"request {self.request_id}: another task is reading this stream")

    def _check_loop(self) -> None:
        if get_running_loop() is not self._router.loop:
            raise IllegalStateError(f"request {self.request_id} was added on another event loop; read it there")

    def _take(self, branch: Branch, index: int) -> RequestOutput:
        start, end = branch.read, len(branch.ids)
        branch.read = end
        self._router.merged += max(end - start - 1, 0)
        ids, finish_reason, stop_reason = branch.ids[start:], branch.finish_reason, branch.stop_reason
        text = ""
        if branch.text is not None:
            # A stop token is part of the tokens, not of the text.
            text = branch.text.push(ids[:-1] if type(stop_reason) is int else ids)
            if finish_reason is not None:
                text += branch.text.flush()
            branch.texts.append(text)
        if finish_reason is not None:
            branch.finished = True
        logprobs = None if branch.logprobs is None else branch.logprobs[start:]
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
        branches = self._inbox.branches
        if self._inbox.usage is None or not all(branch.finished for branch in branches):
            raise IllegalStateError(f"request {self.request_id} has not been read to its end")
        outputs = [
            BranchResult(
                text="".join(branch.texts),
                token_ids=branch.ids,
                logprobs=branch.logprobs,
                index=index,
                finish_reason=branch.finish_reason or FinishReason.ABORT,
                stop_reason=branch.stop_reason,
                score=branch.score,
            )
            for index, branch in enumerate(branches)
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
            if self._inbox.on_over is None:  # whoever observes it is told when it is over
                self._router.forget(self._inbox.number)
