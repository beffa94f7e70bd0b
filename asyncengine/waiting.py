"""Whether anybody waits for what a worker thread computes. A thread cannot be stopped, so what takes long asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

_left: ContextVar[threading.Event | None] = ContextVar("_left", default=None)


class NobodyWaits(BaseException):
    """Ends what a worker thread does. Nobody gets it: whoever would have is gone."""


def run_until(left: threading.Event, function: Callable[[], T]) -> T:
    """The result of `function`, in which `check_awaited` raises once `left` is set. No other call sees that."""
    token = _left.set(left)
    try:
        return function()
    finally:
        _left.reset(token)


def check_awaited() -> None:
    """Goes on if somebody waits for what is computed here, as it is where nobody can leave.

    Raises:
        NobodyWaits: Whoever did has been cancelled.
    """
    left = _left.get()
    if left is not None and left.is_set():
        raise NobodyWaits
