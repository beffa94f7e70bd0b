"""The engine without threads: instructions in, events out, one step at a time. Owned by the step thread.

Nothing here waits. What takes long (checking and loading a model) is handed to `start_job`, whose outcome comes back
as a `JobDone` instruction; instructions that were given after a reload are held until it is through, so that order
is kept, while sequences that run already go on.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from asyncengine import instructions as ins
from asyncengine.errors import (
    EngineClosedError,
    EngineDrainingError,
    EngineFailedError,
    ModelNotLoadedError,
    PrefixCacheError,
    StepError,
)
from asyncengine.instructions import Instruction
from asyncengine.metrics import Counters, EngineMetrics
from asyncengine.state import Action, EngineState, next_state
from asyncengine.step import kept_prefixes
from asyncengine.step.adapters import AdapterTable
from asyncengine.step.adapting import Adapting
from asyncengine.step.batch import Int32
from asyncengine.step.commits import Commits
from asyncengine.step.ending import Ending
from asyncengine.step.model import KeepingModel, LoadedModel, Loader, ModelView
from asyncengine.step.outbox import Outbox
from asyncengine.step.reloading import Reloading
from asyncengine.step.requests import RequestTable
from asyncengine.step.scheduler import Scheduler
from asyncengine.step.sequence import Sequence
from asyncengine.step.stepping import Stepping
from asyncengine.step.warming import Warming
from asyncengine.trace import Trace

logger = logging.getLogger("asyncengine")

StartJob = Callable[[int, Callable[[], Any]], None]
"""Runs a function elsewhere; its outcome must come back to `Core.handle` as `JobDone` with the same number."""


class Core:
    """One engine.

    Attributes:
        state: Read from anywhere, written here.
        view: The loaded model as event loops may know it; likewise.
        stepping_since: When the present step began, by `clock`; None between steps.
        failure: By what the device was lost, or what came of letting the last model go; None if all is well.
    """

    def __init__(
        self,
        loader: Loader,
        start_job: StartJob,
        clock: Callable[[], float] = time.perf_counter,
        trace: Trace | None = None,
    ) -> None:
        self.clock = clock
        self.trace = Trace() if trace is None else trace
        self.outbox = Outbox()
        self.counters = Counters()
        self.requests = RequestTable(self.outbox, self.counters, self.trace, clock, None)
        self.commits = Commits(self.requests)
        self.state = EngineState.UNLOADED
        self.view: ModelView | None = None
        self.loaded: LoadedModel | None = None
        self.scheduler: Scheduler | None = None
        self.stepping_since: float | None = None
        self.failure: BaseException | None = None
        self.stepping = Stepping(self)
        self.warming = Warming(self)
        self.adapting = Adapting(self)
        self.reloading = Reloading(self, loader, start_job)
        self.ending = Ending(self)
        self._epoch = 0
        self._held: deque[Instruction] = deque()
        self._later: list[Instruction] = []
        self._cancelled: set[int] = set()

    # What is there

    @property
    def runnable(self) -> bool:
        """Whether `step` has something to do now."""
        return bool(self._later) or (
            self.scheduler is not None and self.may_step and (self.scheduler.has_work or self.stepping.under_way)
        )

    @property
    def may_step(self) -> bool:
        """Whether the present model may be stepped."""
        steps = self.state in (EngineState.READY, EngineState.LOADING, EngineState.DRAINING)
        return steps and not self.reloading.holds_steps

    @property
    def closed(self) -> bool:
        """Whether it has been shut down."""
        return self.state is EngineState.CLOSED

    @property
    def next_deadline(self) -> float | None:
        """When `step` or `warming.advance` must be called though nothing is runnable, in seconds of the clock."""
        times = [t for t in (self.requests.next_deadline, self.ending.due_at, self.warming.due_at) if t is not None]
        return min([*times, *(when for held in self._held if (when := _first_end(held)) is not None)], default=None)

    def metrics(self) -> EngineMetrics:
        """A snapshot. May be called from any thread; numbers that change meanwhile may be a step apart."""
        scheduler, since = self.scheduler, self.stepping_since
        counters, warm_up = self.counters.copy(), self.warming.progress
        if scheduler is not None:
            counters.preemptions += scheduler.num_preemptions
            counters.prefix_cache_queries += scheduler.prefix_queries
            counters.prefix_cache_hits += scheduler.prefix_hits
        states = None if scheduler is None else scheduler.blocks.states
        return EngineMetrics(
            state=self.state.value,
            num_requests_running=self.requests.num_running,
            num_requests_waiting=self.requests.num_waiting,
            num_requests_queued=self.requests.num_queued,
            kv_blocks_total=scheduler.blocks.pool.num_blocks if scheduler else 0,
            kv_blocks_free=scheduler.blocks.pool.num_free if scheduler else 0,
            kv_blocks_cached=scheduler.blocks.pool.num_cached if scheduler else 0,
            counters=counters,
            step_running_seconds=0.0 if since is None else self.clock() - since,
            warm_up_pieces=warm_up.of,
            warm_up_pieces_done=warm_up.done,
            states_total=0 if states is None else states.places.num_places,
            states_cached=0 if states is None else states.places.num_known,
        )

    # Instructions

    def handle(self, instructions: Collection[Instruction]) -> None:
        """Executes instructions in order. Errors go to whoever gave the instruction."""
        if instructions:
            self.warming.quiet_since = None
        self._later += instructions
        while self._later:  # more may come while one of them waits for the step under way
            due, self._later = self._later, []
            for instruction in due:
                if self._must_wait(instruction):
                    self._held.append(instruction)
                else:
                    self._execute(instruction)

    def _must_wait(self, instruction: Instruction) -> bool:
        """Whether a reload holds it up. Nothing overtakes what waits already."""
        if not self.reloading.busy or isinstance(instruction, _NEVER_HELD):
            return False
        serves = isinstance(instruction, ins.AddRequests) and self.reloading.serves_new_requests
        return not serves or bool(self._held)

    def release_held(self) -> None:
        """Goes on with what was given after a reload, now that it is through."""
        while self._held and not self.reloading.busy:
            self._execute(self._held.popleft())

    def refuse(self, instructions: Iterable[Instruction]) -> None:
        """Answers instructions that will never be executed: the engine is closed."""
        for instruction in instructions:
            if isinstance(instruction, ins.Shutdown):
                self.outbox.reply(instruction.reply_to, ())
            elif isinstance(instruction, ins.JobDone):
                self.reloading.discard(instruction)
            elif not isinstance(instruction, ins.AbortRequests):
                self.outbox.reply(instruction.reply_to, error=EngineClosedError("the engine was shut down"))
            else:
                self.outbox.reply(instruction.reply_to)

    def _execute(self, instruction: Instruction) -> None:
        try:
            self._dispatch(instruction)
        except BaseException as error:  # a debug function may even exit; the thread goes on
            self.outbox.reply(instruction.reply_to, error=error)

    def _dispatch(self, instruction: Instruction) -> None:
        if not isinstance(instruction, _DURING_STEPS):
            self.stepping.land()
        value: object = None
        match instruction:
            case ins.AddRequests():
                self._add(instruction)
                return  # this one, and the others that return, are answered elsewhere
            case ins.JobDone():
                self.reloading.job_done(instruction)
                return
            case ins.Reload():
                self.reloading.begin(Action.RELOAD, instruction)
                return
            case ins.Restart():
                next_state(Action.RESTART, self.state)
                assert self.loaded is not None
                self.reloading.begin(Action.RESTART, ins.Reload(self.loaded.config, "carry", instruction.reply_to))
                return
            case ins.Drain():
                self.ending.drain(instruction.reply_to)
                return
            case ins.Shutdown():
                self.ending.shut_down(instruction)
                return
            case ins.ExtendPrompt():
                self.requests.extend_prompt(instruction)
            case ins.AbortRequests():
                self._abort(instruction)
            case ins.Unload():
                self._unload()
            case ins.Reset():
                self._reset()
            case ins.Pause():
                self.move(Action.PAUSE)
            case ins.Resume():
                self.move(Action.RESUME)
            case ins.Sleep():
                self._sleep()
            case ins.Wake():
                if self.state is EngineState.SLEEPING:
                    assert self.loaded is not None
                    self.loaded.model.wake()
                self.move(Action.WAKE)
            case ins.UpdateWeights():
                value = self._update_weights(instruction.weights)
            case ins.SavePrefixes() | ins.ReadPrefixes() | ins.LoadPrefixes():
                value = self._prefixes(instruction)
            case ins.LoadAdapter():
                value = self.adapting.load(instruction)
            case ins.UnloadAdapter():
                value = self.adapting.unload(instruction.name)
            case ins.Unpin():
                value = self.scheduler is not None and self.scheduler.blocks.tree.unpin(instruction.pin)
            case ins.DebugCall():
                next_state(Action.DEBUG_CALL, self.state)
                assert self.loaded is not None
                value = self.loaded.model.debug_call(instruction.name, instruction.args)
        self.outbox.reply(instruction.reply_to, value)

    def _add(self, add: ins.AddRequests) -> None:
        cancelled = [new for new in add.requests if new.number in self._cancelled]
        if cancelled:
            self._cancelled.difference_update(new.number for new in cancelled)
            for new in cancelled:
                self.requests.end_unadmitted(new, add.mailbox)
            kept = tuple(new for new in add.requests if new not in cancelled)
            if not kept:
                self.outbox.reply(add.reply_to, True)
                return
            add = ins.AddRequests(kept, add.epoch, add.mailbox, add.reply_to, add.when_full)
        if self.state is EngineState.CLOSED or self.ending.shutting_down:
            raise EngineClosedError("the engine is shutting down")
        if self.state is EngineState.FAILED:
            raise EngineFailedError("the device is lost; call restart or reload") from self.failure
        if self.state is EngineState.DRAINING:
            raise EngineDrainingError("the engine is draining and takes no new requests")
        if self.view is None:
            raise ModelNotLoadedError("there is no model; call reload first")
        if add.epoch != self.view.epoch:
            self.outbox.reply(add.reply_to, False)
            return
        self.requests.add(add)

    def _abort(self, abort: ins.AbortRequests) -> None:
        numbers = {*abort.numbers, *self.requests.numbers_of(abort.request_ids)}
        self.requests.abort(numbers)
        for held in self._held:  # requests given after a reload that is still under way
            if isinstance(held, ins.AddRequests):
                for new in held.requests:
                    if new.number in numbers or new.request_id in abort.request_ids:
                        self._cancelled.add(new.number)

    def _expire_held(self) -> None:
        """Refuses requests that a reload holds up and whose deadlines have passed."""
        now = self.clock()
        for held in [each for each in self._held if (when := _first_end(each)) is not None and when <= now]:
            self._held = deque(each for each in self._held if each is not held)
            assert isinstance(held, ins.AddRequests) and held.requests[0].deadlines is not None
            self._cancelled.difference_update(new.number for new in held.requests)
            deadlines = held.requests[0].deadlines
            error = deadlines.exceeded(deadlines.ends()[0][1], f"request {held.requests[0].request_id}")
            self.outbox.reply(held.reply_to, error=error)

    def _unload(self) -> None:
        self.move(Action.UNLOAD)
        self.ending.end_drains()
        self.requests.abort_all()
        self.drop_model()

    def _reset(self) -> None:
        self.move(Action.RESET)
        self.requests.abort_all()
        if self.scheduler is not None:
            self.scheduler.blocks.forget_cache()
            self.scheduler.num_preemptions = 0
            self.scheduler.prefix_hits = self.scheduler.prefix_queries = 0
        self.counters = self.requests.counters = Counters()

    def _sleep(self) -> None:
        if self.state is EngineState.SLEEPING:
            return
        next_state(Action.SLEEP, self.state)
        assert self.loaded is not None and self.scheduler is not None
        self.scheduler.preempt_all()
        self.scheduler.blocks.forget_cache()
        self.loaded.model.sleep()
        self.warming.forget()
        self.move(Action.SLEEP)

    def _update_weights(self, weights: Mapping[str, Any]) -> int:
        """Returns the new weight version."""
        next_state(Action.UPDATE_WEIGHTS, self.state)
        assert self.loaded is not None and self.scheduler is not None
        self.loaded.model.update_weights(weights)
        self.scheduler.blocks.forget_cache()
        return self.scheduler.blocks.weight_version

    def _prefixes(self, instruction: ins.SavePrefixes | ins.ReadPrefixes | ins.LoadPrefixes) -> object:
        loads = isinstance(instruction, ins.LoadPrefixes)
        next_state(Action.LOAD_PREFIX_CACHE if loads else Action.SAVE_PREFIX_CACHE, self.state)
        if instruction.epoch != self._epoch:
            return None
        scheduler, model = self._keeping()
        match instruction:
            case ins.SavePrefixes():
                return kept_prefixes.catalogue_of(scheduler, model, instruction.pin)
            case ins.ReadPrefixes():
                return kept_prefixes.read(scheduler, model, instruction.pin, instruction.part)
            case _:
                return kept_prefixes.put(instruction.kept, scheduler, model)

    def _keeping(self) -> tuple[Scheduler, KeepingModel]:
        assert self.scheduler is not None and self.loaded is not None
        if self.loaded.keeping is None:
            raise PrefixCacheError(f"the prefix cache cannot be kept: {self.loaded.no_keeping}")
        return self.scheduler, self.loaded.keeping

    def move(self, action: Action) -> None:
        """Changes the state as the table says.

        Raises:
            AsyncEngineError: The table does not list it; see `next_state`.
        """
        self.state = next_state(action, self.state)

    # Models

    def install(self, loaded: LoadedModel, kept: AdapterTable | None = None) -> None:
        """Serves a model from now on; what waits goes on with it.

        Args:
            loaded: The model.
            kept: As of `Adapting.take`.
        """
        model, drafting = loaded.model, loaded.drafting

        def place(sequence: Sequence, tokens: Int32) -> None:
            new = sequence.request.new
            prompt, first = len(new.prompt), 0
            if new.media is not None:
                tokens, first = new.media.plain(tokens), new.media.beside
            model.place(sequence.slot, new.params, sequence.branch, tokens[first:prompt], tokens[prompt:])
            if drafting is not None:
                drafting.place(sequence.slot, new.params, sequence.branch, sequence.learnt)

        scheduler = Scheduler(loaded.limits, place, drafting)
        adapters = self.adapting.take(loaded, kept)
        self.stepping.forget()
        self._keep_counts()
        self._epoch += 1
        self.loaded, self.scheduler, self.failure = loaded, scheduler, None
        self.requests.max_queue_size = loaded.config.max_queue_size
        self.requests.attach(scheduler, loaded, adapters)
        self.view = dataclasses.replace(loaded.view(self._epoch), adapters=adapters.names)

    def drop_model(self) -> None:
        """Lets the model go. Requests that are left wait for the next one."""
        self.stepping.forget()
        loaded, self.loaded, self.view = self.loaded, None, None
        self.warming.forget()
        self.requests.detach()
        self.commits.forget()
        self._keep_counts()
        self.scheduler = None
        if loaded is not None:
            loaded.model.close()

    def _keep_counts(self) -> None:
        """Takes over what a scheduler counted that is about to go."""
        if self.scheduler is not None:
            self.counters.preemptions += self.scheduler.num_preemptions
            self.counters.prefix_cache_queries += self.scheduler.prefix_queries
            self.counters.prefix_cache_hits += self.scheduler.prefix_hits

    # Steps

    def step(self, pending: Callable[[], list[Instruction]] = list) -> None:
        """Does what is due: deadlines, one model step, the ends of drains and reloads.

        Args:
            pending: Returns the instructions that have come since it was asked last, or since the last `handle`; asked
                after the model and before its tokens are published, so that aborts among them take effect at once.
        """
        self.requests.expire()
        if self._held:
            self._expire_held()
        if self.scheduler is not None:
            self.requests.admit_queued()
        if self.scheduler is not None and self.may_step and (self.scheduler.has_work or self.stepping.under_way):
            self.stepping.step(self.scheduler, pending)
            self.warming.quiet_since = None
        self.reloading.look()
        if self.scheduler is not None:
            self.requests.admit_queued()  # or else nobody would, if nothing else is left to do
            if not len(self.requests) and not self.stepping.under_way:
                self._settle(self.scheduler)
                self.warming.rest()
        self.ending.look()

    def _settle(self, scheduler: Scheduler) -> None:
        """Looks at the accounts once nothing is left to do; where they are wrong, they begin anew.

        Logged, since there is no request left whose reader could be told.
        """
        self.commits.forget()
        scheduler.residents.forget_rows()
        try:
            scheduler.blocks.check_idle()
        except AssertionError as error:
            self.fail_all(error)
            with suppress(Exception):  # a handler of the program's own may raise, and must not end the thread
                logger.error("the accounts of the KV cache were wrong and begin anew: %s", error, exc_info=error)

    def take_aborts(self, instructions: list[Instruction]) -> None:
        """Executes the aborts among new instructions ahead of the others."""
        for instruction in instructions:
            if isinstance(instruction, ins.AbortRequests):
                numbers = {*instruction.numbers, *self.requests.numbers_of(instruction.request_ids)}
                self.requests.abort(numbers)
        # They stay in line too: one may be meant for a request whose `AddRequests` is right before it.
        self._later += instructions

    def device_lost(self, error: Exception) -> None:
        """Goes into the state in which only a restart, a reload or an unload helps."""
        self.failure = error
        if self.reloading.busy:
            self.reloading.device_lost()
        else:
            self.move(Action.FAIL)
            failed = EngineFailedError("the device was lost while the engine was draining; call restart or reload")
            failed.__cause__ = error
            self.ending.end_drains(failed)

    def fail_all(self, error: Exception) -> None:
        """Ends everything that was admitted, because of a defect of ours, and goes on with the model."""
        self.counters.failed_steps += 1
        failure = StepError(f"the engine failed in a step: {error!r}")
        failure.__cause__ = error
        assert self.loaded is not None
        self.requests.end_without_accounts(failure)
        self.install(self.loaded)

    def die(self, error: BaseException) -> None:
        """Ends everything at once, trusting nothing: the thread cannot go on."""
        failure = EngineClosedError(f"the engine died: {error!r}")
        failure.__cause__ = error
        self.requests.end_without_accounts(failure)
        self.requests.abort_all(failure)  # those that are queued
        self.reloading.cancel(failure)
        self.ending.fail(failure)
        self.refuse([*self._held, *self._later])
        self.state = EngineState.CLOSED

    def give_up_loading(self) -> None:
        """Gives a reload up, and refuses what waits for it."""
        held, self._held = list(self._held), deque()
        self._cancelled.clear()
        self.refuse(held)
        self.reloading.cancel(EngineClosedError("the engine was shut down while the model was loading"))

    def refuse_later(self) -> None:
        """Refuses what was given while an instruction waited for the step under way."""
        later, self._later = self._later, []
        self.refuse(later)


_DURING_STEPS = (ins.AddRequests, ins.ExtendPrompt, ins.AbortRequests, ins.Unpin, ins.Drain, ins.Shutdown)
"""What may be executed while a step is under way: it changes neither the model nor what was launched."""
_NEVER_HELD = (ins.AbortRequests, ins.ExtendPrompt, ins.Shutdown, ins.JobDone, ins.Unpin)


def _first_end(held: Instruction) -> float | None:
    """When the first deadline of requests passes that are not admitted yet; those of one call have the same ones."""
    deadlines = held.requests[0].deadlines if isinstance(held, ins.AddRequests) and held.requests else None
    if deadlines is None or deadlines.since is None:
        return None
    return min((when for when, _ in deadlines.ends()), default=None)
