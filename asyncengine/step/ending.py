"""How an engine finishes what it has: by a drain, or for good. Owned by the step thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncengine.errors import AsyncEngineError, InvalidRequestError
from asyncengine.instructions import ReplyTo, Shutdown
from asyncengine.state import Action, EngineState, next_state

if TYPE_CHECKING:
    from asyncengine.step.core import Core


class Ending:
    """The drains and the shutdowns of a core, which end when its requests have, or when the time for that is over."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._drains: list[ReplyTo | None] = []
        self._shutdowns: list[ReplyTo | None] = []
        self.due_at: float | None = None  # when a shutdown waits no longer, in seconds of the core's clock

    @property
    def shutting_down(self) -> bool:
        """Whether a shutdown waits for requests to end."""
        return bool(self._shutdowns)

    def drain(self, reply_to: ReplyTo | None) -> None:
        """Begins a drain.

        Raises:
            AsyncEngineError: Not in this state.
        """
        self._core.move(Action.DRAIN)
        self._core.requests.look_for_readers()
        self._drains.append(reply_to)

    def shut_down(self, shutdown: Shutdown) -> None:
        """Begins a shutdown, or has one that waits end sooner.

        Raises:
            AsyncEngineError: It is shut down.
            InvalidRequestError: `Shutdown.drain` is not a number >= 0.
        """
        core = self._core
        next_state(Action.SHUTDOWN, core.state)
        if not shutdown.drain >= 0:
            raise InvalidRequestError(f"drain is {shutdown.drain!r}; allowed: seconds >= 0")
        until = core.clock() + shutdown.drain
        self._shutdowns.append(shutdown.reply_to)
        self.due_at = until if self.due_at is None else min(until, self.due_at)
        model_state = core.reloading.state_before or core.state
        core.give_up_loading()
        if core.scheduler is not None and model_state not in (EngineState.SLEEPING, EngineState.FAILED):
            core.state = EngineState.DRAINING
            core.requests.look_for_readers()
        else:
            self.due_at = core.clock()  # nothing can be finished
        self.look()

    def look(self) -> None:
        """Ends what has nothing left to wait for."""
        core = self._core
        if self._shutdowns:
            due = self.due_at is not None and core.clock() >= self.due_at
            goes_on = core.runnable or (core.may_step and core.requests.any_arriving)
            if due or not len(core.requests) or not goes_on:
                self._finish()
        elif self._drains and not len(core.requests):
            core.move(Action.DRAINED)
            self.end_drains()

    def end_drains(self, error: AsyncEngineError | None = None) -> None:
        """Answers whoever waits for a drain."""
        for reply_to in self._drains:
            self._core.outbox.reply(reply_to, error=error)
        self._drains.clear()

    def fail(self, error: AsyncEngineError) -> None:
        """Tells whoever waits that nothing will come of it."""
        for reply_to in (*self._shutdowns, *self._drains):
            self._core.outbox.reply(reply_to, error=error)

    def _finish(self) -> None:
        core = self._core
        core.stepping.land()
        left = core.requests.request_ids()
        core.give_up_loading()
        core.requests.abort_all()
        self.end_drains()
        try:
            core.drop_model()
        except Exception as error:  # it is let go all the same
            core.failure = error
        core.state = EngineState.CLOSED
        core.refuse_later()
        for reply_to in self._shutdowns:
            core.outbox.reply(reply_to, left)
        self._shutdowns.clear()
        self.due_at = None
