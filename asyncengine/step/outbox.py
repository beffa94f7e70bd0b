"""Events on their way out, gathered until the end of a step. Owned by the step thread."""

from __future__ import annotations

from asyncengine.events import Event, Reply
from asyncengine.instructions import Mailbox, ReplyTo


class Outbox:
    """Keeps the order of events per mailbox and posts each mailbox's events in one go."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: dict[Mailbox, list[Event]] = {}

    def add(self, mailbox: Mailbox, event: Event) -> None:
        """Adds an event."""
        events = self._events.get(mailbox)
        if events is None:
            self._events[mailbox] = [event]
        else:
            events.append(event)

    def add_nothing(self, mailbox: Mailbox) -> None:
        """Lets the next `flush` look whether somebody reads a mailbox."""
        self._events.setdefault(mailbox, [])

    def reply(self, to: ReplyTo | None, value: object = None, error: BaseException | None = None) -> None:
        """Answers an instruction."""
        if to is not None:
            self.add(to.mailbox, Reply(to.ticket, value, error))

    def flush(self) -> list[Mailbox]:
        """Posts everything; returns the mailboxes that nobody reads any longer."""
        if not self._events:
            return []
        events, self._events = self._events, {}
        return [mailbox for mailbox, own in events.items() if not mailbox.post(own)]
