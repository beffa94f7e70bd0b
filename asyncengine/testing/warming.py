"""A warm-up whose pieces, latency and faults are given. Owned by the step thread while an engine uses it."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

from asyncengine.warm_up import WarmUp

if TYPE_CHECKING:
    from asyncengine.testing.scripted import ScriptedModel


class ScriptedWarmUp:
    """As `asyncengine.step.model.WarmingModel`: pieces that do nothing, and assert that they are done when they may be.

    Args:
        model: What is warmed up.
        pieces: How many there are.

    Attributes:
        warmth: How far it is.
    """

    def __init__(self, model: ScriptedModel, pieces: int) -> None:
        self.warmth = WarmUp(0, pieces, pieces > 0)
        self._model = model
        self._fault: BaseException | None = None
        self._gate: threading.Semaphore | None = None
        self._entered = threading.Semaphore(0)

    # What a test does

    def fail_next(self, error: BaseException) -> None:
        """Lets the next piece raise."""
        self._fault = error

    def hold(self) -> None:
        """Lets each piece wait, from now on, until `let` allows it."""
        self._gate = threading.Semaphore(0)

    def let(self, pieces: int = 1) -> None:
        """Allows a number of pieces."""
        assert self._gate is not None
        self._gate.release(pieces)

    def release(self) -> None:
        """Undoes `hold`."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.release()  # at most one piece is held

    def wait_until_held(self, timeout: float = 10.0) -> bool:
        """Blocks until a held piece has begun; call it from a thread."""
        return self._entered.acquire(timeout=timeout)

    # What the engine does

    def warm_up(self) -> str:
        """As `asyncengine.step.model.WarmingModel`."""
        assert self.warmth.goes_on, "there is nothing left to do"
        assert not self._model.closed, "a model that was let go is warmed up"
        assert not self._model.asleep, "a model that sleeps is warmed up"
        assert not self._model.under_way, "a step is under way"
        gate = self._gate
        if gate is not None:
            self._entered.release()
            gate.acquire()
        if self._fault is not None:
            error, self._fault = self._fault, None
            raise error
        done = self.warmth.done + 1
        self.warmth = dataclasses.replace(self.warmth, done=done, goes_on=done < self.warmth.of)
        return f"piece {done}"
