"""Where events go on one event loop: to the futures of instructions and to the inboxes of streams.

Owned by its loop: made there, and touched there alone.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from asyncengine.classifier import Classifier
from asyncengine.events import (
    Attention,
    BranchEnded,
    BranchKey,
    Event,
    Pooled,
    PromptLogprobs,
    Reply,
    RequestEnded,
    Tokens,
)
from asyncengine.instructions import ReplyTo
from asyncengine.loop import delivery
from asyncengine.loop.branch import Branch, Waiter
from asyncengine.loop.observer import RequestOver
from asyncengine.outputs import FinishReason, Usage
from asyncengine.step.batch import Float32, Int32, TokenLogprobs
from asyncengine.stream_back import StreamBack


class Inbox:
    """What has come for one request. What was not read yet is one pending delta per branch, however slow the reader.

    Attributes:
        prompt: (tokens,) of a request that wants log-probabilities of its prompt.
        prompt_logprobs: Those that have come, the first token's None included; of a request with a question about its
            prompt, the answer alone.
        pooled: The prompt's hidden states, pooled, once they have come.
        attention: What the prompt's tokens attend to, as `asyncengine.events.Attention.parts`, once all of it has come.
        classifier: What makes logits of them, of a request for those.
        on_over: Called when the request is over; None where nobody observes it.
    """

    __slots__ = (
        "attention", "branches", "classifier", "ended", "error", "number", "on_over", "pooled", "prompt",
        "prompt_logprobs", "usage",
    )  # fmt: skip

    def __init__(self, number: int, branches: list[Branch]) -> None:
        self.number = number
        self.branches = branches
        self.ended = False
        self.usage: Usage | None = None
        self.error: BaseException | None = None
        self.prompt: Int32 | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.pooled: Float32 | None = None
        self.attention: tuple[Float32, ...] | None = None
        self.classifier: Classifier | None = None
        self.on_over: Callable[[RequestOver], None] | None = None

    def end(self, usage: Usage | None = None, error: BaseException | None = None) -> None:
        """Notes that nothing more will come, and wakes the reader."""
        self.usage, self.error = usage, error
        self.ended = True
        for branch in self.branches:
            branch.streaming = False
        self.wake()
        on_over, self.on_over = self.on_over, None
        if on_over is not None:
            reasons = tuple(branch.finish_reason or FinishReason.ABORT for branch in self.branches)
            on_over(RequestOver(reasons, usage, error))

    @property
    def has_reader(self) -> bool:
        """Whether somebody waits."""
        return any(branch.waiter is not None and not branch.waiter.done() for branch in self.branches)

    def expect(self, waiter: Waiter | None) -> None:
        """Wakes `waiter` when something comes for any branch; None wakes nobody."""
        for branch in self.branches:
            branch.waiter = waiter

    def wake(self) -> None:
        """Wakes the reader, if one waits."""
        for branch in self.branches:
            waiter, branch.waiter = branch.waiter, None
            if waiter is not None and not waiter.done():
                waiter.set_result(None)


class Router:
    """Delivers the events of one engine on one loop.

    Attributes:
        loop: The one that owns it.
        stream_back: The mailbox that the step thread posts to.
        merged: Tokens that were added to a delta nobody had read yet.
    """

    __slots__ = (
        "_branches", "_futures", "_inboxes", "_keys", "_tickets", "loop", "merged", "stream_back",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._tickets = itertools.count()
        self._futures: dict[int, asyncio.Future[Any]] = {}
        self._inboxes: dict[int, Inbox] = {}
        self._keys: tuple[BranchKey, ...] = ()
        self._branches: list[Branch] = []
        self.merged = 0
        self.stream_back = StreamBack(loop, self.deliver)

    def expect_reply(self) -> tuple[ReplyTo, asyncio.Future[Any]]:
        """Returns the address that an instruction carries, and the future of its reply."""
        ticket = next(self._tickets)
        future = self._futures[ticket] = self.loop.create_future()
        self.stream_back.make_sure()
        return ReplyTo(self.stream_back, ticket), future

    def expect_no_reply(self, to: ReplyTo) -> None:
        """Undoes `expect_reply`: nobody waits, and most likely the instruction was not given."""
        del self._futures[to.ticket]

    def register(self, inbox: Inbox) -> None:
        """Delivers to `inbox` from now on."""
        self._inboxes[inbox.number] = inbox

    def forget(self, number: int) -> None:
        """Stops delivering to an inbox; what comes for it is dropped."""
        self._inboxes.pop(number, None)

    @property
    def idle(self) -> bool:
        """Whether nothing is expected any longer."""
        return not self._futures and not self._inboxes

    def deliver(self, event: Event) -> None:
        """Delivers one event."""
        if type(event) is Tokens:
            if event.keys is not self._keys:
                self._look_up(event.keys)
            if event.logprobs is not None:
                for branch, logprob in zip(self._branches, event.logprobs, strict=True):
                    if logprob is not None and branch.logprobs is not None:
                        branch.logprobs.append(logprob)
            delivery.deliver_tokens(self._branches, event.token_ids)
        elif type(event) is BranchEnded:
            known = self._inboxes.get(event.key[0])
            if known is not None:
                branch = known.branches[event.key[1]]
                branch.streaming = False
                branch.finish_reason = event.finish_reason
                branch.stop_reason = event.stop_reason
                branch.score = event.score
                known.wake()
        elif type(event) is RequestEnded:
            known = self._inboxes.pop(event.number, None)
            if known is not None:
                known.end(event.usage, event.error)
        elif type(event) is PromptLogprobs:
            known = self._inboxes.get(event.number)
            if known is not None and known.prompt_logprobs is not None:
                known.prompt_logprobs += event.logprobs
        elif type(event) is Pooled:
            known = self._inboxes.get(event.number)
            if known is not None:
                known.pooled, known.classifier = event.vector, event.classifier
        elif type(event) is Attention:
            known = self._inboxes.get(event.number)
            if known is not None:
                known.attention = event.parts
        else:
            assert type(event) is Reply
            future = self._futures.pop(event.ticket, None)
            if future is None or future.done():
                return  # its awaiter was cancelled, or interrupted when the instruction had just been given
            if event.error is not None:
                error = event.error
                if isinstance(error, StopIteration) or not isinstance(error, Exception):
                    # A future refuses the one; the others (SystemExit, CancelledError) are not meant for the awaiter.
                    error = RuntimeError(f"the call raised {error!r}")
                    error.__cause__ = event.error
                future.set_exception(error)
                future.exception()  # an awaiter that is cancelled right now will not fetch it: that is no mistake
            else:
                future.set_result(event.value)

    def _look_up(self, keys: tuple[BranchKey, ...]) -> None:
        """Remembers whom the keys mean: the same tuple comes again as long as the batch does not change."""
        self._keys = keys
        self._branches = []
        for number, index in keys:
            inbox = self._inboxes.get(number)
            self._branches.append(Branch() if inbox is None else inbox.branches[index])
