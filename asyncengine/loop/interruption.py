"""How one task ends what another awaits, without ending the task. Owned by the loop on which it is entered."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self


class Interruption:
    """``with Interruption() as interruption`` leaves its block early, without an error, once `interrupt` is called.

    What the block awaits is cancelled once, as by `asyncio.timeout`: whatever cleans up there may await. A cancellation
    by anybody else goes on its way.
    """

    __slots__ = ("_before", "_cancelled", "_loop", "_task")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[object] | None = task  # while it is in the block
        self._loop = task.get_loop()
        self._before = task.cancelling()
        self._cancelled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        assert task is not None
        return self._cancelled and task.uncancel() <= self._before and exc_type is asyncio.CancelledError

    def interrupt(self) -> None:
        """Ends the block, if it has not ended. Idempotent; from any thread."""
        # Not at once: the task may be the one that runs now, and would be cancelled wherever it awaits next.
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    # As a future, for whoever wakes readers

    def done(self) -> bool:
        """As `asyncio.Future`."""
        return self._task is None

    def set_result(self, result: None, /) -> None:
        """As `asyncio.Future`."""
        self.interrupt()
