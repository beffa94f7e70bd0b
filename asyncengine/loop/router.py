"""Where events go on one event loop: to the futures of instructions and to the inboxes of streams.

Owned by its loop: made there, and touched there alone.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, Protocol

from asyncengine.events import BranchEnded, BranchKey, Event, PromptLogprobs, Reply, RequestEnded, Tokens
from asyncengine.instructions import ReplyTo
from asyncengine.outputs import FinishReason, Usage
from asyncengine.step.batch import Int32, TokenLogprobs
from asyncengine.stream_back import StreamBack


class Waiter(Protocol):
    """Whoever waits for an inbox: a future, or something that looks like one."""

    def done(self) -> bool:
        """As `asyncio.Future`."""
        ...

    def set_result(self, result: None, /) -> None:
        """As `asyncio.Future`."""
        ...


class Branch:
    """What has come for one branch and was not read yet."""

    __slots__ = ("finish_reason", "finished", "ids", "inbox", "logprobs", "stop_reason")

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.finished = False  # whether the reader has had the finish reason


class Inbox:
    """What has come for one request and was not read yet. One pending delta per branch, whatever the reader does.

    Attributes:
        waiter: Woken, once, when something comes.
        prompt: (tokens,) of a request that wants log-probabilities of its prompt.
        prompt_logprobs: Those that have come, the first token's None included.
    """

    __slots__ = ("branches", "ended", "error", "number", "prompt", "prompt_logprobs", "usage", "waiter")

    def __init__(self, number: int, branches: int) -> None:
        self.number = number
        self.branches = [Branch(self) for _ in range(branches)]
        self.waiter: Waiter | None = None
        self.ended = False
        self.usage: Usage | None = None
        self.error: BaseException | None = None
        self.prompt: Int32 | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None

    def wake(self) -> None:
        """Wakes the reader, if one waits."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Router:
    """Delivers the events of one engine on one loop.

    Attributes:
        loop: The one that owns it.
        stream_back: The mailbox that the step thread posts to.
        merged: Tokens that were added to a delta nobody had read yet.
    """

    __slots__ = ("_futures", "_inboxes", "_keys", "_targets", "_tickets", "loop", "merged", "stream_back")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._tickets = itertools.count()
        self._futures: dict[int, asyncio.Future[Any]] = {}
        self._inboxes: dict[int, Inbox] = {}
        self._keys: tuple[BranchKey, ...] = ()
        self._targets: list[Branch] = []
        self.merged = 0
        self.stream_back = StreamBack(loop, self.deliver)

    def expect_reply(self) -> tuple[ReplyTo, asyncio.Future[Any]]:
        """Returns the address that an instruction carries, and the future of its reply."""
        ticket = next(self._tickets)
        future = self._futures[ticket] = self.loop.create_future()
        return ReplyTo(self.stream_back, ticket), future

    def expect_no_reply(self, to: ReplyTo) -> None:
        """Undoes `expect_reply`: the instruction could not be given."""
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
                for target, logprob in zip(self._targets, event.logprobs, strict=True):
                    if logprob is not None:
                        target.logprobs.append(logprob)
            # The one loop that runs once per token.
            for target, token_id in zip(self._targets, event.token_ids, strict=True):
                target.ids.append(token_id)
                owner = target.inbox
                waiter = owner.waiter
                if waiter is not None:
                    owner.waiter = None
                    if not waiter.done():
                        waiter.set_result(None)
        elif type(event) is BranchEnded:
            inbox = self._inboxes.get(event.key[0])
            if inbox is not None:
                branch = inbox.branches[event.key[1]]
                branch.finish_reason = event.finish_reason
                branch.stop_reason = event.stop_reason
                inbox.wake()
        elif type(event) is RequestEnded:
            inbox = self._inboxes.pop(event.number, None)
            if inbox is not None:
                inbox.usage = event.usage
                inbox.error = event.error
                inbox.ended = True
                inbox.wake()
        elif type(event) is PromptLogprobs:
            inbox = self._inboxes.get(event.number)
            if inbox is not None and inbox.prompt_logprobs is not None:
                inbox.prompt_logprobs += event.logprobs
        else:
            assert type(event) is Reply
            future = self._futures.pop(event.ticket)
            if future.done():
                return  # its awaiter was cancelled
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
        inboxes = self._inboxes
        nowhere = Branch(Inbox(-1, 0))
        targets = []
        for number, index in keys:
            inbox = inboxes.get(number)
            targets.append(nowhere if inbox is None else inbox.branches[index])
        self._keys, self._targets = keys, targets
