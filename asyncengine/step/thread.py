"""The step thread: drives a `Core` while there is work and sleeps on the instruction queue when there is none.

The thread holds the core, and whoever owns the engine holds the thread; the thread never holds the engine, so an
engine that is dropped without being shut down can notice it and end its thread.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from asyncengine.errors import EngineClosedError
from asyncengine.instruction_queue import InstructionQueue
from asyncengine.instructions import Instruction, JobDone, Shutdown
from asyncengine.state import EngineState
from asyncengine.step.core import Core
from asyncengine.step.model import LoadedModel, Loader
from asyncengine.step.released import released
from asyncengine.trace import Trace

EXIT_SECONDS = 5.0
"""How long an exiting interpreter lets a step that is under way finish. A thread that comes back from native code into
an interpreter that is gone takes the process down with it."""


class StepThread:
    """One thread and its instruction queue. Starts with the first instruction."""

    def __init__(self, loader: Loader, trace: Trace, name: str = "asyncengine-step") -> None:
        self.queue: InstructionQueue[Instruction] = InstructionQueue()
        self.core = Core(loader, self._start_job, trace=trace)
        self._name = name
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()  # a signal's handler may join where the thread is being started
        self.died: BaseException | None = None

    def put(self, instruction: Instruction) -> None:
        """Gives an instruction. Safe from any thread; blocks only to start the thread.

        Raises:
            EngineClosedError: The engine was shut down.
        """
        if self._thread is None:
            self._start()
        self.queue.put(instruction)

    def join(self, timeout: float | None = None) -> None:
        """Waits until the thread has ended. A signal's handler that interrupts its start does not."""
        if not self._starting.acquire(timeout=-1 if timeout is None else max(timeout, 0.0)):
            return
        thread = self._thread  # which another thread may have been about to start
        self._starting.release()
        if thread is not None and thread is not threading.current_thread():
            with suppress(RuntimeError):  # it is about to be started, by what this interrupts
                thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and not self.queue.closed:
                # A daemon, because an engine that nobody shut down must not keep the interpreter from exiting.
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                # Noted first: an exception out of `start` (the user's Ctrl-C) does not mean that it has not started.
                self._thread = thread
                _running.add(self)
                try:
                    thread.start()
                except RuntimeError:  # there are too many threads
                    self._thread = None
                    _running.discard(self)
                    raise

    def _run(self) -> None:
        try:
            self._drive()
        except BaseException as error:  # a defect of ours: nobody may be left waiting
            self.died = error
            self.core.die(error)
            raise
        finally:
            self.core.refuse(self.queue.close())
            self._flush()
            _running.discard(self)

    def _drive(self) -> None:
        core, queue = self.core, self.queue
        while not core.closed:
            core.handle(queue.drain())
            self._flush()  # nobody waits for a whole step to hear that an instruction is done
            core.step(queue.drain)
            if self._flush() or core.closed or core.runnable or len(queue):
                continue
            if core.warming.advance():
                continue  # whatever came meanwhile goes first
            deadline = core.next_deadline
            queue.wait(None if deadline is None else deadline - core.clock())

    def _flush(self) -> bool:
        """Posts what there is; returns whether that ended requests, so that there may be more to do."""
        closed = self.core.outbox.flush()
        for mailbox in closed:
            self.core.requests.abort_mailbox(mailbox)
            self.core.outbox.flush()  # nobody reads these either
        return bool(closed)

    def _start_job(self, job: int, function: Callable[[], Any]) -> None:
        def run() -> None:
            value = error = None
            try:
                value = function()
            except BaseException as exception:
                error = released(exception)
            try:
                self.queue.put(JobDone(job, value, error))
            except EngineClosedError:
                if isinstance(value, LoadedModel):
                    value.model.close()
            finally:
                value = error = None  # the error's traceback refers to this frame
                _loads.discard(thread)

        thread = threading.Thread(target=run, name=f"{self._name}-load-{job}", daemon=True)
        _loads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # there are too many threads
            _loads.discard(thread)
            raise

    def stop(self) -> None:
        """Lets the thread end as soon as its present step is over. Never blocks, never starts it."""
        try:
            self.queue.put(Shutdown())
        except EngineClosedError:
            pass

    def abandon(self) -> None:
        """Notes that this process was forked from the one in which the thread runs."""
        self.died = EngineClosedError("the engine runs in the process from which this one was forked; make one here")
        self.core.state = EngineState.CLOSED
        self._starting = threading.RLock()  # another thread may have held it
        self.queue.abandon(str(self.died))


_running: set[StepThread] = set()  # each is held by its own running thread anyway
_loads: set[threading.Thread] = set()  # a load may outlive the step thread


@atexit.register
def _stop_all() -> None:
    until = time.monotonic() + EXIT_SECONDS
    running = list(_running)
    for thread in running:
        thread.stop()
    for thread in running:
        thread.join(max(until - time.monotonic(), 0.0))
    for load in list(_loads):
        load.join(max(until - time.monotonic(), 0.0))


def _abandon_all() -> None:
    for thread in _running:
        thread.abandon()
    _running.clear()
    _loads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
