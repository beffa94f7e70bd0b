"""Work that is given up when a deadline of the request passes that it is done for. On the event loop."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import anyio

from asyncengine.instructions import Deadlines

T = TypeVar("T")


async def in_time(work: Awaitable[T], deadlines: Deadlines | None, now: float) -> T:
    """The result of `work`, which a deadline cancels.

    What comes before a request's admission is bounded by this, what follows by the step thread, which knows more: that
    a request has had its first token, for instance.

    Args:
        work: What comes before the admission.
        deadlines: Of the request; they have begun.
        now: Seconds of their clock.

    Raises:
        DeadlineExceededError: One passed.
    """
    if deadlines is None or not (ends := deadlines.ends()):
        return await work
    when, name = ends[0]
    with anyio.move_on_after(max(when - now, 0.0)):
        return await work
    raise deadlines.exceeded(name, "a request that was not admitted yet")
