"""How the steps of a model follow each other. Owned by the step thread.

A model that can launch a step without waiting for it is kept one step ahead: while step N is computed, step N + 1 is
scheduled and launched, and what N drew is looked at while N + 1 is computed. So the device has work while the host
does its own. Between two calls of `step`, one launched step may be under way::

    step():    launch N+1 | collect N | commit N        step():    launch N+2 | collect N+1 | commit N+1
    device:    ... N ...|........ N+1 ................................|......... N+2 .........

A sequence that turns out to be complete when N is committed has a row in N + 1 already; that row's token is dropped.
Where N + 1 cannot be scheduled without the tokens of N (`Plan.bound`, preemption), N is landed first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncengine.errors import StepError
from asyncengine.instructions import Instruction
from asyncengine.step import failures
from asyncengine.step.batch import StepTokens
from asyncengine.step.model import LaunchingModel
from asyncengine.step.plan import Plan
from asyncengine.step.released import released
from asyncengine.step.scheduler import Scheduler

if TYPE_CHECKING:
    from asyncengine.step.core import Core


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step under way.

    Attributes:
        plan: What it computes.
        flight: What the model keeps of it.
        at: When it was launched.
    """

    plan: Plan
    flight: Any
    at: float


class Stepping:
    """Steps the core's model, ahead where it can."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._launched: _Launched | None = None
        self._landed_at = 0.0
        self._pending: Callable[[], list[Instruction]] = list

    @property
    def under_way(self) -> bool:
        """Whether a step was launched and not collected yet."""
        return self._launched is not None

    def step(self, scheduler: Scheduler, pending: Callable[[], list[Instruction]]) -> None:
        """Brings one step to its end, if there is one, and launches the one after it, if that can be.

        Args:
            scheduler: The core's.
            pending: As of `Core.step`.
        """
        core = self._core
        core.stepping_since = begun = core.clock()
        self._pending = pending
        try:
            self._step(scheduler, begun)
        except Exception as error:  # a defect of ours: nothing about the requests can be trusted
            core.fail_all(error)
        finally:
            core.stepping_since = None

    def land(self) -> None:
        """Waits for the step that is under way, if there is one, and commits it."""
        core = self._core
        launched, self._launched = self._launched, None
        if launched is None:
            return
        core.stepping_since = begun = core.clock()
        try:
            self._land(launched, begun)
        except Exception as error:
            core.fail_all(error)
        finally:
            core.stepping_since = None

    def forget(self) -> None:
        """Waits for the step that is under way, if there is one, and drops what comes of it."""
        launched, self._launched = self._launched, None
        if launched is not None:
            self._outcome(launched)

    def _step(self, scheduler: Scheduler, begun: float) -> None:
        core = self._core
        assert core.loaded is not None
        launched = self._launched
        if launched is None:
            plan, dropped = self._schedule(scheduler)
            if plan is None:
                if not dropped and not scheduler.num_running:
                    self._end_stuck_head(scheduler)
                return
            if plan.bound or core.loaded.launching is None or scheduler.drafting is not None:
                self._execute(scheduler, plan, begun)
                return
            begins = self._launch(core.loaded.launching, scheduler, plan)
            if isinstance(begins, Exception):
                self._failed(plan, begins)
                return
            launched = self._launched = begins
        assert core.loaded.launching is not None
        scheduler.residents.finish_full()
        plan, _ = self._schedule(scheduler, ahead=True)
        after = None if plan is None else self._launch(core.loaded.launching, scheduler, plan)
        self._launched = None if isinstance(after, Exception) else after
        self._land(launched, begun)
        if plan is not None and isinstance(after, Exception):
            self._failed(plan, after)

    def _schedule(self, scheduler: Scheduler, ahead: bool = False) -> tuple[Plan | None, bool]:
        """A step, and whether a request was dropped."""
        requests = self._core.requests
        plan = scheduler.schedule(ahead)
        dropped = bool(scheduler.dropped)
        if dropped:
            failures.drop(requests)
        if plan is not None:
            requests.begin(plan)
        return plan, dropped

    def _launch(self, model: LaunchingModel, scheduler: Scheduler, plan: Plan) -> _Launched | Exception:
        at = self._core.clock()
        try:
            flight = model.launch(plan.batch)
        except Exception as error:
            return error
        scheduler.advance(plan)
        return _Launched(plan, flight, at)

    def _execute(self, scheduler: Scheduler, plan: Plan, begun: float) -> None:
        """Computes a step and commits it."""
        core = self._core
        assert core.loaded is not None
        at = core.clock()
        try:
            drawn = core.loaded.model.execute(plan.batch)
            _check(plan, drawn)
        except Exception as error:
            self._failed(plan, error)
            return
        ended = core.clock()
        scheduler.advance(plan)
        self._commit(scheduler, plan, drawn)
        self._count(plan, begun, at, ended)

    def _land(self, launched: _Launched, begun: float) -> None:
        """Waits for a launched step and commits it; another one may be under way behind it."""
        core, scheduler = self._core, self._core.scheduler
        assert scheduler is not None
        drawn = self._outcome(launched)
        at, ended = max(launched.at, self._landed_at), core.clock()
        self._landed_at = ended
        if isinstance(drawn, Exception):
            self._failed(launched.plan, drawn)
            return
        self._commit(scheduler, launched.plan, drawn)
        self._count(launched.plan, begun, at, ended)

    def _outcome(self, launched: _Launched) -> StepTokens | Exception:
        loaded = self._core.loaded
        assert loaded is not None and loaded.launching is not None
        try:
            drawn = loaded.launching.collect(launched.flight)
            _check(launched.plan, drawn)
        except Exception as error:
            return error
        return drawn

    def _commit(self, scheduler: Scheduler, plan: Plan, drawn: StepTokens) -> None:
        core = self._core
        scheduler.settle(plan, drawn.taken)
        core.take_aborts(self._pending())
        if drawn.failed:
            failures.drop_rows(core.requests, plan, drawn.failed)
        core.commits.commit(plan, drawn, scheduler.residents.departures != plan.departures)

    def _count(self, plan: Plan, begun: float, model_begun: float, model_ended: float) -> None:
        core, batch = self._core, plan.batch
        ended, counters = core.clock(), core.counters
        counters.steps += 1
        counters.batched_sequences += len(batch.context_lens)
        counters.step_seconds.observe(ended - begun)
        counters.model_seconds.observe(model_ended - model_begun)
        if core.trace.enabled:
            core.trace.span(
                "step", begun, ended, tokens=len(batch.token_ids), decodes=batch.num_decodes, prefills=len(plan.chunks)
            )
            core.trace.span("model", max(begun, model_begun), model_ended)

    def _failed(self, plan: Plan, error: Exception) -> None:
        """Ends the requests in a failed step. The one behind it is dropped: who is in that one alone begins anew."""
        core, (after, self._launched) = self._core, (self._launched, None)
        assert core.loaded is not None
        core.counters.failed_steps += 1
        failures.fail_step(core.requests, plan, error)
        errors = [error] if after is None else [error, self._outcome(after)]
        for each in errors:
            if isinstance(each, Exception):
                released(each)
        lost = (e for e in errors if isinstance(e, Exception) and core.loaded.model.device_lost(e))
        if (loss := next(lost, None)) is not None:
            core.device_lost(loss)

    def _end_stuck_head(self, scheduler: Scheduler) -> None:
        pool, page_size = scheduler.blocks.pool, scheduler.limits.page_size
        head = scheduler.waiting.head()
        if head is not None:
            self._core.requests.end_head(
                StepError(
                    f"request {head.request.new.request_id}: {len(head.tokens)} tokens need "
                    f"{-(-len(head.tokens) // page_size)} blocks of {page_size}; of {pool.num_blocks} blocks only "
                    f"{pool.num_free + pool.num_cached} can be had while nothing runs (the others are pinned)"
                )
            )


def _check(plan: Plan, drawn: StepTokens) -> None:
    """Raises: StepError: The model did not give what was due."""
    if len(drawn.token_ids) != len(plan.batch.sample_index):
        raise StepError(f"the model drew {len(drawn.token_ids)} tokens; {len(plan.batch.sample_index)} were due")
    if len(drawn.pooled) != len(plan.batch.pool_spans):
        raise StepError("the model gives out no hidden states")
    if (spans := plan.batch.attention_spans) is not None and len(drawn.attention) != len(spans):
        raise StepError("the model does not tell what its tokens attend to")
