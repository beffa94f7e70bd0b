"""When a model does what makes it faster: piece by piece, while nobody wants anything. Owned by the step thread.

A piece is done if the engine is ready, has no requests, and has had nothing to do for a moment: clients that ask one
question after the other leave short gaps, and a piece that began in each would delay every question of theirs. Between
two pieces the thread looks at its instructions; so what comes waits for one piece at most.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from asyncengine.state import EngineState
from asyncengine.warm_up import NOTHING, WarmUp

if TYPE_CHECKING:
    from asyncengine.step.core import Core

QUIET_SECONDS = 0.1
"""How long nothing must have happened before a piece is done."""


class Warming:
    """Warms the core's model up.

    Attributes:
        quiet_since: When it was seen that nothing is left to do, by the core's clock; None if there is something.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self.quiet_since: float | None = None
        self._failure: str | None = None  # what the present model's warm-up raised, in words

    def rest(self) -> None:
        """Notes that there is nothing to do."""
        if self.quiet_since is None:
            self.quiet_since = self._core.clock()

    @property
    def progress(self) -> WarmUp:
        """How far the present model is. Read from any thread."""
        loaded, failure = self._core.loaded, self._failure
        if loaded is None or loaded.warming is None:
            return NOTHING
        progress = loaded.warming.warmth
        if failure is not None:
            return dataclasses.replace(progress, goes_on=False, notes=(*progress.notes, failure))
        return progress

    def forget(self) -> None:
        """Notes that the model is let go, or sleeps and will begin anew."""
        self._failure = None

    @property
    def due_at(self) -> float | None:
        """When the next piece may be done, in seconds of the clock; None if nothing but an instruction changes that."""
        core, since = self._core, self.quiet_since
        rests = core.state is EngineState.READY and not len(core.requests) and not core.stepping.under_way
        return since + QUIET_SECONDS if since is not None and rests and self.progress.goes_on else None

    def advance(self) -> bool:
        """Does one piece if that is due; returns whether it did. What it raises ends the warm-up, and nothing else."""
        core, due_at = self._core, self.due_at
        if due_at is None or core.clock() < due_at:
            return False
        loaded = core.loaded
        assert loaded is not None and loaded.warming is not None
        core.stepping_since = begun = core.clock()
        try:
            what = loaded.warming.warm_up()
        except Exception as error:
            self._failure = f"the model's warm-up failed and goes no further: {error!r}"
            if loaded.model.device_lost(error):
                core.device_lost(error)
            return True
        finally:
            core.stepping_since = None
        if core.trace.enabled:
            progress = self.progress
            core.trace.span("warm-up", begun, core.clock(), piece=what, done=progress.done, of=progress.of)
        return True
