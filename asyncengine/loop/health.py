"""`AsyncEngine.health`: whether an engine is well. Reads what the step thread writes; waits for nothing."""

from __future__ import annotations

from dataclasses import dataclass

from asyncengine.state import EngineState
from asyncengine.step.thread import StepThread
from asyncengine.warm_up import WarmUp

_ADMITTING = (EngineState.READY, EngineState.PAUSED, EngineState.SLEEPING)


@dataclass(frozen=True, slots=True)
class Health:
    """Attributes:
    ok: Whether the engine does what its state promises.
    state: Of the engine.
    problems: What is wrong, in words; empty if all is well.
    notes: What works but not as fast, or not as exactly, as it could, in words.
    loading: What a reload is doing, if one is under way.
    admits: Whether a request that is given now waits for no model: there is one, and no reload that lets new ones wait.
    step_running_seconds: How long the present step has been running; 0 between steps.
    warm_up: How much of what makes the loaded model faster is done; its notes are among `notes`.
    """

    ok: bool
    state: EngineState
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    loading: str | None
    admits: bool
    step_running_seconds: float
    warm_up: WarmUp


def health_of(thread: StepThread) -> Health:
    """Looks at an engine's thread and core."""
    core = thread.core
    state, since, loaded = core.state, core.stepping_since, core.loaded
    running = 0.0 if since is None else max(core.clock() - since, 0.0)
    problems = []
    if loaded is not None and running > loaded.config.step_timeout:
        limit = loaded.config.step_timeout
        problems.append(f"the step has been running for {running:.1f} s; step_timeout is {limit} s")
    if state is EngineState.FAILED:
        problems.append(f"the device is lost: {core.failure!r}; call restart")
    if thread.died is not None:
        problems.append(f"the step thread died: {thread.died!r}")
    notes = () if loaded is None else loaded.notes
    if loaded is not None and loaded.drafting is not None and loaded.drafting.failure is not None:
        notes = (*notes, f"speculation: drafting failed, there are no drafts any more: {loaded.drafting.failure!r}")
    warm_up = core.warming.progress
    notes = (*notes, *warm_up.notes)
    admits = state in _ADMITTING or core.reloading.serves_new_requests
    return Health(not problems, state, tuple(problems), notes, core.reloading.phase, admits, running, warm_up)
