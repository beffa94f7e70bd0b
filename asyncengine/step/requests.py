"""The requests of one engine: admission, ends, deadlines, and what each step's tokens mean. Owned by the step thread.

Whatever happens to a request, it leaves through `_end`, once: every branch gets its finish reason, then the request
its usage.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from asyncengine.detokenizer import BEFORE, TextStream
from asyncengine.errors import (
    AsyncEngineError,
    EngineOverloadedError,
    InvalidRequestError,
)
from asyncengine.events import BranchEnded, RequestEnded
from asyncengine.instructions import AddRequests, ExtendPrompt, Mailbox, NewRequest, ReplyTo
from asyncengine.metrics import Counters
from asyncengine.outputs import FinishReason, Usage
from asyncengine.step.adapters import Adapter, AdapterTable, unknown_adapter
from asyncengine.step.arriving import Arriving
from asyncengine.step.batch import NO_TOKENS
from asyncengine.step.beam_search import BeamSearch
from asyncengine.step.deadlines import DeadlineQueue
from asyncengine.step.fitting import misfit
from asyncengine.step.model import LoadedModel
from asyncengine.step.outbox import Outbox
from asyncengine.step.plan import Plan
from asyncengine.step.scheduler import Scheduler
from asyncengine.step.searches import told
from asyncengine.step.sequence import Request, Sequence, SequenceState
from asyncengine.step.stand_ins import StandIns
from asyncengine.trace import Trace


@dataclass(frozen=True, slots=True)
class _Queued:
    """A request that waits for room in the waiting queue, and who is told once there is."""

    new: NewRequest
    mailbox: Mailbox
    reply_to: ReplyTo | None


class RequestTable:
    """Requests between admission and end."""

    def __init__(
        self, outbox: Outbox, counters: Counters, trace: Trace, clock: Callable[[], float], max_queue_size: int | None
    ) -> None:
        self.outbox = outbox
        self.counters = counters
        self.scheduler: Scheduler | None = None
        self.max_queue_size = max_queue_size
        self.loaded: LoadedModel | None = None
        self._stand_ins = StandIns()
        self.adapters = AdapterTable()
        self.trace = trace
        self.clock = clock
        self._requests: dict[int, Request] = {}
        self._numbers: dict[str, int] = {}
        # Ordered, because a dict finds its first entry slowly after many deletions.
        self._queued: OrderedDict[int, _Queued] = OrderedDict()
        self._waiting_new = 0  # requests that have not had their first step
        self._arrivals = 0
        self._deadlines = DeadlineQueue((self._requests, self._queued))

    # What is there

    def __len__(self) -> int:
        return len(self._requests) + len(self._queued)

    @property
    def num_waiting(self) -> int:
        """Admitted requests without a sequence in the batch. May be read from any thread."""
        return max(len(self._requests) - self.num_running, 0)  # the two are read one after the other

    @property
    def num_running(self) -> int:
        """Requests with a sequence in the batch. May be read from any thread."""
        while (scheduler := self.scheduler) is not None:
            try:
                return len({sequence.key[0] for sequence in scheduler.running()})
            except RuntimeError:  # the step thread changed it meanwhile
                continue
        return 0

    @property
    def num_queued(self) -> int:
        """Requests that wait for room in the waiting queue."""
        return len(self._queued)

    @property
    def any_arriving(self) -> bool:
        """Whether the prompt of a request has not come whole."""
        return any(request.arriving is not None for request in self._requests.values())

    @property
    def next_deadline(self) -> float | None:
        """When the next deadline passes, in seconds of the clock."""
        return self._deadlines.next

    def request_ids(self) -> tuple[str, ...]:
        """Public ids of all requests, in order of arrival."""
        queued = (entry.new.request_id for entry in self._queued.values())
        return (*(request.new.request_id for request in self._requests.values()), *queued)

    def numbers_of(self, request_ids: Iterable[str]) -> list[int]:
        """Numbers of those of the public ids that are known."""
        return [number for request_id in request_ids if (number := self._numbers.get(request_id)) is not None]

    # Admission

    def add(self, instruction: AddRequests) -> None:
        """Admits requests, all or none; those for which there is no room yet are queued.

        Raises:
            InvalidRequestError: An id is in use, or an adapter is not loaded.
            EngineOverloadedError: The waiting queue is full and the caller does not want to wait.
        """
        if not instruction.requests:
            self.outbox.reply(instruction.reply_to, True)
            return
        seen: set[str] = set()
        for new in instruction.requests:
            if new.request_id in self._numbers or new.request_id in seen:
                raise InvalidRequestError(f"request_id is {new.request_id!r}; a request with this id has not ended yet")
            seen.add(new.request_id)
            if new.adapter is not None and self.adapters.get(new.adapter) is None:
                raise InvalidRequestError(unknown_adapter(new.adapter, self.adapters.names))
        full = self.max_queue_size
        # More than it ever takes, as the pieces of a long audio may be, come in when nobody else waits.
        if (
            instruction.when_full == "raise"
            and full is not None
            and self._waiting_new + len(self._queued) + min(len(instruction.requests), full) > full
        ):
            self.counters.admission_rejections += len(instruction.requests)
            raise EngineOverloadedError(
                f"{self._waiting_new + len(self._queued)} requests wait; max_queue_size is {full}"
            )
        for new in instruction.requests:
            self._numbers[new.request_id] = new.number
            last = new is instruction.requests[-1]
            self._queued[new.number] = _Queued(new, instruction.mailbox, instruction.reply_to if last else None)
            if new.deadlines is not None:
                self._deadlines.add(new.number, new.deadlines.begun(self.clock()))
        self.admit_queued()

    def admit_queued(self) -> None:
        """Moves queued requests into the waiting queue, oldest first, as far as there is room."""
        while self._queued and (self.max_queue_size is None or self._waiting_new < self.max_queue_size):
            _, queued = self._queued.popitem(last=False)
            self._admit(queued.new, queued.mailbox)
            self.outbox.reply(queued.reply_to, True)

    def _admit(self, new: NewRequest, mailbox: Mailbox) -> None:
        assert self.scheduler is not None and self.loaded is not None
        now, tokenizer = self.clock(), self.loaded.tokenizer
        self._arrivals += 1
        self._waiting_new += 1
        plain = new.prompt
        if new.media is not None:
            new = dataclasses.replace(new, prompt=self._stand_ins.put(plain, new.media))
        request = Request(new, mailbox, self._arrivals, now, adapter=self.adapters.get(new.adapter))
        if new.params.search is not None:
            request.search = BeamSearch(new.params)
        request.branches = [Sequence(request, branch) for branch in range(new.params.num_sequences)]
        if new.params.stop_strs and tokenizer is not None:
            params, before = new.params, plain[-BEFORE:].tolist()
            for branch in request.branches:
                branch.text = TextStream(tokenizer, params.stop_strs, params.skip_special_tokens, before)
        self._requests[new.number] = request
        if self.trace.enabled:
            more = {} if new.adapter is None else {"adapter": new.adapter}
            self.trace.mark("b", "request", now, new.number, id=new.request_id, prompt_tokens=new.prompt_tokens, **more)
        if new.arriving:
            request.arriving = Arriving()
            request.branches[0].state = SequenceState.HELD
        else:
            self.scheduler.add(request.branches[0])

    # Prompts that come in pieces

    def extend_prompt(self, piece: ExtendPrompt) -> None:
        """Gives a request the next piece of its prompt; one that has ended is passed over."""
        request = self._requests.get(piece.number)
        if request is None or (arriving := request.arriving) is None:
            return
        before = len(arriving.tokens)
        arriving.take(piece.keep, piece.tokens, piece.complete)
        if request.started_at is not None:
            self.counters.prompt_tokens += len(arriving.tokens) - before
        looked_at = len(arriving.tokens) - len(piece.tokens)
        error = None
        if self.loaded is not None:
            error = misfit(request.new, [piece.tokens], self.loaded, self.adapters, looked_at)
        if error is not None:
            self.end_branches(request, FinishReason.ERROR, error)
        elif request.branches[0].state is not SequenceState.PREFILL:  # or else, once that is done
            self.compute_ahead(request, arriving)

    def compute_ahead(self, request: Request, arriving: Arriving) -> None:
        """Lets a request whose prompt has not come whole compute what is due of it, or wait for more."""
        first, scheduler = request.branches[0], self.scheduler
        if scheduler is not None and first in scheduler.waiting:
            scheduler.waiting.remove(first)
        first.state = SequenceState.HELD
        request.computed_ahead = arriving.computed
        tokens = NO_TOKENS
        if arriving.complete:
            tokens, request.arriving = arriving.tokens, None
        elif scheduler is not None and request.new.params.num_prompt_logprobs < 0:  # those are computed from the start
            tokens = arriving.due(scheduler.limits, scheduler.blocks.tree, request.space)
        request.new = dataclasses.replace(request.new, prompt=tokens)
        for branch in request.branches:
            branch.tokens = tokens
            if arriving.complete and branch.text is not None:
                branch.text.begin_behind(tokens[-BEFORE:].tolist())
        if scheduler is None:
            first.state = SequenceState.WAITING  # as all do until there is a model
        elif len(tokens):
            scheduler.add(first)

    # Ends

    def abort(self, numbers: Iterable[int], error: AsyncEngineError | None = None) -> bool:
        """Ends requests with reason "abort"; returns whether any was known."""
        known = False
        for number in numbers:
            if number in self._queued:
                known = True
                self._end_queued(number, error)
            request = self._requests.get(number)
            if request is not None:
                known = True
                self.end_branches(request, FinishReason.ABORT, error)
        return known

    def abort_all(self, error: AsyncEngineError | None = None) -> None:
        """Ends every request with reason "abort"."""
        self.abort([*self._requests, *self._queued], error)

    def look_for_readers(self) -> None:
        """Has every mailbox posted to, though there may be nothing to tell: one whose loop is closed is found so.

        Of a request that is given no tokens, as one that awaits the rest of its prompt, it would not be noticed.
        """
        for request in self._requests.values():
            self.outbox.add_nothing(request.mailbox)

    def abort_mailbox(self, mailbox: Mailbox) -> None:
        """Ends the requests that nobody reads any longer."""
        self.abort([r.new.number for r in self._requests.values() if r.mailbox is mailbox])
        self.abort([number for number, queued in self._queued.items() if queued.mailbox is mailbox])

    def end_unadmitted(
        self,
        new: NewRequest,
        mailbox: Mailbox,
        error: AsyncEngineError | None = None,
        reason: FinishReason = FinishReason.ABORT,
    ) -> None:
        """Tells of the end of a request that was never admitted."""
        for branch in range(new.params.n):
            self.outbox.add(mailbox, BranchEnded((new.number, branch), reason))
        self.outbox.add(mailbox, RequestEnded(new.number, Usage(new.prompt_tokens, 0), error))
        self.counters.requests[str(reason)] += 1

    def _end_queued(
        self, number: int, error: AsyncEngineError | None = None, reason: FinishReason = FinishReason.ABORT
    ) -> None:
        queued = self._queued.pop(number)
        del self._numbers[queued.new.request_id]
        self.end_unadmitted(queued.new, queued.mailbox, error, reason)
        self.outbox.reply(queued.reply_to, True)

    def expire(self) -> None:
        """Ends the requests whose deadlines have passed."""
        now = self.clock()
        if now < self._deadlines.soonest:
            return
        for number, kind in self._deadlines.passed(now):
            if (queued := self._queued.get(number)) is not None:
                self._end_queued(number, _exceeded(queued.new, kind))
            elif (request := self._requests.get(number)) is not None:
                met = {"queue": request.started_at, "first_token": request.first_token_at}.get(kind)
                if met is None:
                    self.end_branches(request, FinishReason.ABORT, _exceeded(request.new, kind))

    def end_head(self, error: AsyncEngineError) -> None:
        """Ends the request that is first in the waiting queue: it can never run."""
        assert self.scheduler is not None
        head = self.scheduler.waiting.head()
        if head is not None:
            self.end_branches(head.request, FinishReason.ERROR, error)

    def end_without_accounts(self, error: AsyncEngineError) -> None:
        """Ends every admitted request although the scheduler's accounts may be wrong; it is not used again."""
        scheduler, self.scheduler = self.scheduler, None
        for request in list(self._requests.values()):
            for branch in request.branches:
                if scheduler is not None and branch.resident:
                    branch.num_output = len(scheduler.tokens_of(branch)) - len(request.new.prompt)
            self.end_branches(request, FinishReason.ERROR, error)

    def end_branches(self, request: Request, reason: FinishReason, error: AsyncEngineError | None = None) -> None:
        """Ends those branches of a request that have not ended."""
        if request.search is not None:
            self._end_search(request, request.search, reason, error)
            return
        for branch in request.branches:
            if branch.state is not SequenceState.ENDED:
                self.end_branch(branch, reason, error=error)

    def end_branch(
        self,
        branch: Sequence,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: AsyncEngineError | None = None,
    ) -> None:
        """Ends a branch, and with the last one its request.

        Args:
            branch: One that has not ended.
            reason: Why it ends.
            stop_reason: The stop token or string.
            error: Told with the end of the request.
        """
        self._take_out(branch)
        request = branch.request
        self.outbox.add(request.mailbox, BranchEnded(branch.key, reason, stop_reason))
        if all(b.state is SequenceState.ENDED for b in request.branches):
            self._end(request, reason, error)

    def _end_search(
        self, request: Request, search: BeamSearch, reason: FinishReason, error: AsyncEngineError | None
    ) -> None:
        """Ends a beam search, for `reason` if it is not over, and tells of the best that it has found until then."""
        for beam in request.branches:
            self._take_out(beam)
        for event in told(request, search, reason):
            self.outbox.add(request.mailbox, event)
        self.counters.generation_tokens += search.num_told
        if search.num_told:
            self.note_first_token(request, self.clock())
        self._end(request, reason, error)

    def _take_out(self, branch: Sequence) -> None:
        if self.scheduler is None:
            branch.state = SequenceState.ENDED
        else:
            self.scheduler.end(branch)

    def note_first_token(self, request: Request, now: float) -> None:
        """Notes that a request has its first token."""
        request.first_token_at = now
        self.counters.time_to_first_token_seconds.observe(now - request.arrived_at)
        if self.trace.enabled:
            self.trace.mark("n", "first token", now, request.new.number)

    def _end(self, request: Request, reason: FinishReason, error: AsyncEngineError | None) -> None:
        now, number = self.clock(), request.new.number
        assert not request.ended
        request.ended = True
        del self._requests[number]
        del self._numbers[request.new.request_id]
        if request.started_at is None:
            self._waiting_new -= 1
        usage = request.usage(now)
        request.branches = []  # they know their request: what is in its prompt goes now, not with the next collection
        self.outbox.add(request.mailbox, RequestEnded(number, usage, error))
        self.counters.requests[str(reason)] += 1
        self.counters.e2e_request_latency_seconds.observe(usage.total_seconds)
        if self.trace.enabled:
            self.trace.mark(
                "e", "request", now, number, finish_reason=str(reason), completion_tokens=usage.completion_tokens
            )

    # Adapters

    def replace_adapter(self, former: Adapter, adapter: Adapter) -> None:
        """Goes on with an adapter that was loaded anew; what requests computed with the former one stays their own."""
        for request in self._requests.values():
            if request.adapter is not former:
                continue
            request.adapter = adapter
            for branch in request.branches:
                branch.weight_version = -1  # what it has computed is kept out of the prefix cache
            if request.arriving is not None:
                request.arriving.computed = 0
        if self.scheduler is not None:
            self.scheduler.blocks.tree.forget(former.space)

    def abort_adapter(self, adapter: Adapter) -> None:
        """Ends the requests that use an adapter, and forgets what was computed with it."""
        self.abort([request.new.number for request in self._requests.values() if request.adapter is adapter])
        self.abort([number for number, queued in self._queued.items() if queued.new.adapter == adapter.name])
        if self.scheduler is not None:
            self.scheduler.blocks.tree.forget(adapter.space)

    # Life cycle of the model

    def attach(self, scheduler: Scheduler, loaded: LoadedModel, adapters: AdapterTable) -> None:
        """Goes on with another model. Requests that do not fit it are ended."""
        self.scheduler, self.loaded, self.adapters = scheduler, loaded, adapters
        for request in list(self._requests.values()):
            request.adapter = adapters.get(request.new.adapter)
            if request.pooled is not None or request.attention:  # what is of another model is not to be added to
                request.pooled, request.attention, request.scored = None, (), 0
            unfinished = [branch for branch in request.branches if branch.state is not SequenceState.ENDED]
            sequences = [branch.tokens for branch in unfinished]
            if (arriving := request.arriving) is not None:
                sequences.append(arriving.tokens)
                arriving.computed = 0
                self.compute_ahead(request, arriving)
            else:
                for branch in unfinished:
                    if branch.state is SequenceState.WAITING:
                        scheduler.add(branch)
            error = misfit(request.new, sequences, loaded, adapters)
            if error is not None:
                self.end_branches(request, FinishReason.ERROR, error)
        for number, queued in list(self._queued.items()):
            error = misfit(queued.new, [queued.new.prompt], loaded, adapters)
            if error is not None:
                self._end_queued(number, error, FinishReason.ERROR)

    def detach(self) -> None:
        """Lets the model go; what remains waits for the next one."""
        if self.scheduler is not None:
            self.scheduler.preempt_all()
        self.scheduler = self.loaded = None

    # One step

    def begin(self, plan: Plan) -> None:
        """Notes which requests have their first step."""
        for chunk in plan.chunks:
            request = chunk.sequence.request
            if request.started_at is None:
                request.started_at = now = self.clock()
                self._waiting_new -= 1
                self.counters.request_queue_seconds.observe(now - request.arrived_at)
                self.counters.prompt_tokens += request.prompt_tokens
                if request.new.media is not None:
                    self.counters.image_tokens += request.new.media.num_tokens("image")
                    self.counters.audio_tokens += request.new.media.num_tokens("audio")
                    self.counters.video_tokens += request.new.media.num_tokens("video")
            if self.trace.enabled:
                self.trace.mark("n", "prefill", self.clock(), request.new.number, tokens=chunk.count)


def _exceeded(new: NewRequest, kind: str) -> AsyncEngineError:
    assert new.deadlines is not None
    return new.deadlines.exceeded(kind, f"request {new.request_id}")
