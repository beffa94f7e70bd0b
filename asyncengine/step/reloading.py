"""How one model takes the place of another. Owned by the step thread.

A reload is a small machine of its own, moved on by `JobDone` and, between steps, by `look`:

    CHECKING ──fits beside──▶ LOADING_BESIDE ──▶ EMPTYING ──▶ swap
        └──does not fit─────▶ EMPTYING ──old model let go──▶ LOADING_ALONE ──▶ install

Until the old model is let go, any failure leaves it serving.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncengine.errors import AsyncEngineError, IllegalStateError, ReloadError
from asyncengine.instructions import JobDone, Reload
from asyncengine.state import Action, EngineState, next_state
from asyncengine.step.adapters import AdapterTable
from asyncengine.step.model import LoadedModel, Loader, LoadPlan

if TYPE_CHECKING:
    from asyncengine.step.core import Core, StartJob

logger = logging.getLogger("asyncengine")


class _Phase(enum.Enum):
    CHECKING = "checking"
    LOADING_BESIDE = "loading beside the present model"
    EMPTYING = "waiting for requests in flight"
    LOADING_ALONE = "loading"


@dataclass(slots=True)
class _Reload:
    asked: Reload
    state_before: EngineState
    phase: _Phase = _Phase.CHECKING
    plan: LoadPlan | None = None
    beside: LoadedModel | None = None
    adapters: AdapterTable | None = None  # those to go on with


class Reloading:
    """At most one reload at a time; the core holds further instructions back while `busy`."""

    def __init__(self, core: Core, loader: Loader, start_job: StartJob) -> None:
        self._core = core
        self._loader = loader
        self._start_job = start_job
        self._reload: _Reload | None = None
        self._job = 0

    @property
    def busy(self) -> bool:
        """Whether a reload is under way."""
        return self._reload is not None

    @property
    def phase(self) -> str | None:
        """What the reload is doing, in words."""
        reload = self._reload  # read from anywhere: it may go meanwhile
        return None if reload is None else reload.phase.value

    @property
    def state_before(self) -> EngineState | None:
        """The state to which a reload that fails early returns."""
        return None if self._reload is None else self._reload.state_before

    @property
    def holds_steps(self) -> bool:
        """Whether the present model must not be stepped: it was paused, asleep or lost before."""
        return self._reload is not None and self._reload.state_before is not EngineState.READY

    @property
    def serves_new_requests(self) -> bool:
        """Whether requests that are given now go to the present model."""
        reload = self._reload
        return (
            reload is not None
            and reload.asked.new_requests == "serve"
            and reload.state_before is EngineState.READY
            and reload.phase in (_Phase.CHECKING, _Phase.LOADING_BESIDE)
        )

    def begin(self, action: Action, asked: Reload) -> None:
        """Begins a reload, or a restart.

        Raises:
            AsyncEngineError: Not in this state.
        """
        core = self._core
        before = core.state
        after = next_state(action, before)
        if asked.in_flight == "wait" and before in (EngineState.PAUSED, EngineState.SLEEPING) and len(core.requests):
            raise IllegalStateError(
                f"in_flight is 'wait', but the engine is {before.value} and its {len(core.requests)} requests "
                "will not finish; resume or wake it first, or choose 'abort' or 'carry'"
            )
        core.state = after
        core.requests.look_for_readers()
        self._reload = reload = _Reload(asked, before)
        config = asked.config
        if action is Action.RESTART:  # with the adapters that are there, not with those that there were at first
            reload.adapters, config = core.adapting.table, config.replace(adapters={})
        current, loader = core.loaded, self._loader
        self._start(lambda: loader.check(config, current))

    def job_done(self, done: JobDone) -> None:
        """Moves on when a job has ended."""
        reload = self._reload
        if reload is None or done.job != self._job:
            self.discard(done)
            return
        try:
            self._go_on(reload, done)
        except Exception as error:  # the loader broke its promise, or the limits cannot be served
            if self._reload is not reload:
                raise
            self._fail(error)

    def _go_on(self, reload: _Reload, done: JobDone) -> None:
        if done.error is not None:
            self._fail(done.error)
            return
        if reload.phase is _Phase.CHECKING:
            plan = reload.plan = done.value
            assert isinstance(plan, LoadPlan)
            if not self._may_carry(reload):
                return
            # Nothing goes beside a lost device, and where there is no model, none is beside.
            alone = self._core.loaded is None or reload.state_before is EngineState.FAILED
            if plan.fits_beside and not alone:
                reload.phase = _Phase.LOADING_BESIDE
                loader = self._loader
                self._start(lambda: loader.load(plan))
            else:
                reload.phase = _Phase.EMPTYING
        else:
            loaded = done.value
            assert isinstance(loaded, LoadedModel)
            if reload.phase is _Phase.LOADING_BESIDE:
                reload.beside = loaded
                reload.phase = _Phase.EMPTYING
            else:
                assert reload.phase is _Phase.LOADING_ALONE
                self._finish(loaded)
        self.look()

    def look(self) -> None:
        """Lets the old model go as soon as the requests in flight allow it."""
        reload = self._reload
        if reload is not None and reload.phase is _Phase.EMPTYING:
            try:
                self._empty(reload)
            except Exception as error:
                if self._reload is not reload:
                    raise
                self._fail(error)

    def _empty(self, reload: _Reload) -> None:
        core = self._core
        if reload.asked.in_flight == "wait" and len(core.requests) and not self.holds_steps:
            return
        core.stepping.land()
        if reload.asked.in_flight == "abort":
            core.requests.abort_all()
        elif reload.asked.in_flight == "wait" and len(core.requests) and not self._same_tokenizer(reload):
            # Those that wait behind a lost device cannot finish on it.
            core.requests.abort_all(ReloadError("the device was lost and the new model has another tokenizer"))
        if reload.beside is not None:
            core.drop_model()
            self._finish(reload.beside)
            return
        reload.phase = _Phase.LOADING_ALONE
        core.drop_model()
        plan, loader = reload.plan, self._loader
        assert plan is not None
        self._start(lambda: loader.load(plan))

    def device_lost(self) -> None:
        """Notes that the present model was lost while its successor is being loaded."""
        assert self._reload is not None
        self._reload.state_before = EngineState.FAILED

    def cancel(self, error: AsyncEngineError) -> None:
        """Gives a reload up; what its job makes will be let go."""
        reload, self._reload = self._reload, None
        if reload is None:
            return
        self._job += 1
        if reload.beside is not None:
            _let_go(reload.beside)
        self._core.outbox.reply(reload.asked.reply_to, error=error)

    def discard(self, done: JobDone) -> None:
        """Lets go of what a job made that nobody waits for any longer."""
        if isinstance(done.value, LoadedModel):
            _let_go(done.value)

    def _start(self, function: Callable[[], Any]) -> None:
        self._job += 1
        try:
            self._start_job(self._job, function)
        except Exception as error:  # there are too many threads
            self._fail(error)

    def _same_tokenizer(self, reload: _Reload) -> bool:
        view, plan = self._core.view, reload.plan
        return view is None or plan is None or plan.tokenizer_key == view.tokenizer_key

    def _may_carry(self, reload: _Reload) -> bool:
        may_be_some = len(self._core.requests) or self.serves_new_requests
        if reload.asked.in_flight != "carry" or not may_be_some or self._same_tokenizer(reload):
            return True
        self._fail(ReloadError("in_flight is 'carry', but the new model has another tokenizer than the present one"))
        return False

    def _finish(self, loaded: LoadedModel) -> None:
        core, reload = self._core, self._reload
        assert reload is not None
        reload.beside = None
        if reload.adapters is not None:
            loaded = dataclasses.replace(loaded, config=loaded.config.replace(adapters=reload.asked.config.adapters))
        try:
            core.install(loaded, reload.adapters)
        except Exception:
            _let_go(loaded)
            raise
        self._reload = None
        core.move(Action.LOADED)
        core.outbox.reply(reload.asked.reply_to, loaded.config)
        core.release_held()

    def _fail(self, cause: BaseException) -> None:
        core, reload = self._core, self._reload
        assert reload is not None
        self._reload = None
        if reload.beside is not None:
            _let_go(reload.beside)
        error = cause
        if not isinstance(cause, AsyncEngineError):
            error = ReloadError(f"loading {reload.asked.config.model!r} failed: {cause!r}")
            error.__cause__ = cause
        if core.loaded is not None:
            core.state = reload.state_before
        else:
            lost = ReloadError(f"the model was let go and {reload.asked.config.model!r} failed to load")
            lost.__cause__ = cause
            core.requests.abort_all(lost)
            core.move(Action.LOAD_FAILED)
        core.outbox.reply(reload.asked.reply_to, error=error)
        core.release_held()


def _let_go(loaded: LoadedModel) -> None:
    """Closes a model that never served. What that raises answers nobody's call, and is logged."""
    try:
        loaded.model.close()
    except Exception as error:
        with suppress(Exception):  # a handler of the program's own may raise
            logger.error("a model could not be let go: %s", error, exc_info=error)
