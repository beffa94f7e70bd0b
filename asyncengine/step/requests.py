"""The requests of one engine: admission, ends, deadlines, and what each step's tokens mean. Owned by the step thread.

Whatever happens to a request, it leaves through `_end`, once: every branch gets its finish reason, then the request
its usage.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from asyncengine.detokenizer import TextStream
from asyncengine.errors import (
    AsyncEngineError,
    DeadlineExceededError,
    EngineOverloadedError,
    InvalidRequestError,
    RequestDroppedError,
    StepError,
)
from asyncengine.events import BranchEnded, BranchKey, Pooled, PromptLogprobs, RequestEnded, Tokens
from asyncengine.instructions import AddRequests, ExtendPrompt, Mailbox, NewRequest, ReplyTo
from asyncengine.metrics import Counters
from asyncengine.outputs import FinishReason, Usage
from asyncengine.step.arriving import Arriving
from asyncengine.step.batch import Float32, Int32, Int64, StepTokens, TokenLogprobs
from asyncengine.step.drafting import Drafts
from asyncengine.step.outbox import Outbox
from asyncengine.step.plan import Chunk, Plan
from asyncengine.step.scheduler import Scheduler
from asyncengine.step.sequence import EMPTY, Request, Sequence, SequenceState
from asyncengine.step.slots import SlotTable
from asyncengine.tokenizer import Tokenizer
from asyncengine.trace import Trace


@dataclass(frozen=True, slots=True)
class _Queued:
    """A request that waits for room in the waiting queue, and who is told once there is."""

    new: NewRequest
    mailbox: Mailbox
    reply_to: ReplyTo | None


_Beyond = tuple[list[int], bool]
"""What a grammar says of a drawn token: which tokens follow without a choice, and whether the text is complete then."""


@dataclass(slots=True)
class _Rows:
    """What is derived from a list of decoding sequences, kept while the list stays the same.

    Attributes:
        decodes: The sequences.
        keys: For each mailbox: its rows (None is all), and their keys.
        watched: Rows that have stop strings.
        stop_ids: (rows, columns) stop tokens.
        steps_left: Steps after which the first of them has all its tokens.
    """

    decodes: list[Sequence]
    keys: list[tuple[Mailbox, Int64 | None, tuple[BranchKey, ...]]]
    watched: list[tuple[int, Sequence]]
    stop_ids: Int32
    steps_left: int


_NO_ROWS = _Rows([], [], [], np.empty((0, 0), dtype=np.int32), 0)


class RequestTable:
    """Requests between admission and end."""

    def __init__(
        self, outbox: Outbox, counters: Counters, trace: Trace, clock: Callable[[], float], max_queue_size: int | None
    ) -> None:
        self.outbox = outbox
        self.counters = counters
        self.scheduler: Scheduler | None = None
        self.max_queue_size = max_queue_size
        self._tokenizer: Tokenizer | None = None
        self._vocab_size = 0
        self._embeds = True
        self._trace = trace
        self._clock = clock
        self._requests: dict[int, Request] = {}
        self._numbers: dict[str, int] = {}
        # Ordered, because a dict finds its first entry slowly after many deletions.
        self._queued: OrderedDict[int, _Queued] = OrderedDict()
        self._waiting_new = 0  # requests that have not had their first step
        self._arrivals = 0
        self._deadlines: list[tuple[float, int, str]] = []
        self._rows = _NO_ROWS

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
    def next_deadline(self) -> float | None:
        """When the next deadline passes, in seconds of the clock."""
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

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
            InvalidRequestError: An id is in use.
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
        full = self.max_queue_size
        if (
            instruction.when_full == "raise"
            and full is not None
            and self._waiting_new + len(self._queued) + len(instruction.requests) > full
        ):
            self.counters.admission_rejections += len(instruction.requests)
            raise EngineOverloadedError(
                f"{self._waiting_new + len(self._queued)} requests wait; max_queue_size is {full}"
            )
        for new in instruction.requests:
            self._numbers[new.request_id] = new.number
            last = new is instruction.requests[-1]
            self._queued[new.number] = _Queued(new, instruction.mailbox, instruction.reply_to if last else None)
        self.admit_queued()

    def admit_queued(self) -> None:
        """Moves queued requests into the waiting queue, oldest first, as far as there is room."""
        while self._queued and (self.max_queue_size is None or self._waiting_new < self.max_queue_size):
            _, queued = self._queued.popitem(last=False)
            self._admit(queued.new, queued.mailbox)
            self.outbox.reply(queued.reply_to, True)

    def _admit(self, new: NewRequest, mailbox: Mailbox) -> None:
        assert self.scheduler is not None
        now = self._clock()
        self._arrivals += 1
        self._waiting_new += 1
        request = Request(new, mailbox, self._arrivals, now)
        request.branches = [Sequence(request, branch) for branch in range(new.params.n)]
        if new.params.stop_strs and self._tokenizer is not None:
            for branch in request.branches:
                branch.text = TextStream(self._tokenizer, new.params.stop_strs, new.params.skip_special_tokens)
        self._requests[new.number] = request
        if new.deadlines is not None:
            for kind in ("queue", "first_token", "total"):
                seconds = getattr(new.deadlines, kind)
                if seconds is not None:
                    heapq.heappush(self._deadlines, (now + seconds, new.number, kind))
            if len(self._deadlines) > 64 + 6 * len(self._requests):  # most are of requests that have ended
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._requests]
                heapq.heapify(self._deadlines)
        if self._trace.enabled:
            self._trace.mark("b", "request", now, new.number, id=new.request_id, prompt_tokens=len(new.prompt))
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
        error = None if self.scheduler is None else self._misfit(request.new, [arriving.tokens], self._vocab_size)
        if error is not None:
            self._end_branches(request, FinishReason.ERROR, error)
        elif request.branches[0].state is not SequenceState.PREFILL:  # or else, once that is done
            self._compute_ahead(request, arriving)

    def _compute_ahead(self, request: Request, arriving: Arriving) -> None:
        """Lets a request whose prompt has not come whole compute what is due of it, or wait for more."""
        first, scheduler = request.branches[0], self.scheduler
        if scheduler is not None and first in scheduler.waiting:
            scheduler.waiting.remove(first)
        first.state = SequenceState.HELD
        request.computed_ahead = arriving.computed
        tokens = EMPTY
        if arriving.complete:
            tokens, request.arriving = arriving.tokens, None
        elif scheduler is not None and request.new.params.num_prompt_logprobs < 0:  # those are computed from the start
            tokens = arriving.due(scheduler.limits, scheduler.tree)
        request.new = dataclasses.replace(request.new, prompt=tokens)
        for branch in request.branches:
            branch.tokens = tokens
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
                self._end_branches(request, FinishReason.ABORT, error)
        return known

    def abort_all(self, error: AsyncEngineError | None = None) -> None:
        """Ends every request with reason "abort"."""
        self.abort([*self._requests, *self._queued], error)

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
        self.outbox.add(mailbox, RequestEnded(new.number, Usage(len(new.prompt), 0), error))
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
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, kind = heapq.heappop(self._deadlines)
            request = self._requests.get(number)
            if request is None:
                continue
            met = {"queue": request.started_at, "first_token": request.first_token_at}.get(kind)
            if met is None:
                limit = getattr(request.new.deadlines, kind)
                self._end_branches(
                    request,
                    FinishReason.ABORT,
                    DeadlineExceededError(f"request {request.new.request_id}: the {kind} deadline of {limit} s passed"),
                )

    def end_head(self, error: AsyncEngineError) -> None:
        """Ends the request that is first in the waiting queue: it can never run."""
        assert self.scheduler is not None
        head = self.scheduler.waiting.head()
        if head is not None:
            self._end_branches(head.request, FinishReason.ERROR, error)

    def drop(self) -> None:
        """Ends the requests whose parameters the model refused."""
        assert self.scheduler is not None
        dropped, self.scheduler.dropped = self.scheduler.dropped, []
        for sequence, cause in dropped:
            error = RequestDroppedError(f"request {sequence.request.new.request_id}: {cause}")
            error.__cause__ = cause
            self._end_branches(sequence.request, FinishReason.ERROR, error)

    def drop_rows(self, plan: Plan, failed: Mapping[int, Exception]) -> None:
        """Ends the requests for which the model could not draw; what is in the cache of them is right.

        Rows with drafts are left to `commit`: they may have had tokens before.
        """
        rows = [*plan.decodes, *(branch for chunk in plan.chunks for branch in chunk.branches)]
        ahead = 0 if plan.drafts is None else len(plan.drafts.token_ids)
        for row, cause in failed.items():
            if ahead and row < plan.num_decode_samples:
                continue
            sequence = rows[row - ahead]
            if sequence.state is not SequenceState.ENDED:
                self._drop_undrawn(sequence.request, cause)

    def _drop_undrawn(self, request: Request, cause: Exception) -> None:
        if not request.ended:
            error = RequestDroppedError(f"request {request.new.request_id}: no token could be drawn: {cause!r}")
            error.__cause__ = cause
            self._end_branches(request, FinishReason.ERROR, error)

    def fail(self, plan: Plan, cause: Exception) -> None:
        """Ends the requests that took part in a failed step; the others are computed again."""
        assert self.scheduler is not None
        batch = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks)]
        batch = [sequence for sequence in batch if sequence.resident]  # one that has ended may have a row yet
        for request in {sequence.request.new.number: sequence.request for sequence in batch}.values():
            error = StepError(f"request {request.new.request_id}: the step failed: {cause}")
            error.__cause__ = cause
            # What the failed step was writing must not reach the prefix cache, nor anyone who shares blocks.
            for branch in request.branches:
                branch.weight_version = -1
            self._end_branches(request, FinishReason.ERROR, error)
        self.scheduler.preempt_all()

    def end_without_accounts(self, error: AsyncEngineError) -> None:
        """Ends every admitted request although the scheduler's accounts may be wrong; it is not used again."""
        scheduler, self.scheduler = self.scheduler, None
        for request in list(self._requests.values()):
            for branch in request.branches:
                if scheduler is not None and branch.resident:
                    branch.num_output = len(scheduler.tokens_of(branch)) - len(request.new.prompt)
            self._end_branches(request, FinishReason.ERROR, error)

    def _end_branches(self, request: Request, reason: FinishReason, error: AsyncEngineError | None = None) -> None:
        for branch in request.branches:
            if branch.state is not SequenceState.ENDED:
                self._end_branch(branch, reason, error=error)

    def _end_branch(
        self,
        branch: Sequence,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: AsyncEngineError | None = None,
    ) -> None:
        if self.scheduler is None:
            branch.state = SequenceState.ENDED
        else:
            self.scheduler.end(branch)
        request = branch.request
        self.outbox.add(request.mailbox, BranchEnded(branch.key, reason, stop_reason))
        if all(b.state is SequenceState.ENDED for b in request.branches):
            self._end(request, reason, error)

    def _end(self, request: Request, reason: FinishReason, error: AsyncEngineError | None) -> None:
        now, number = self._clock(), request.new.number
        assert not request.ended
        request.ended = True
        del self._requests[number]
        del self._numbers[request.new.request_id]
        if request.started_at is None:
            self._waiting_new -= 1
        total = now - request.arrived_at
        first = request.first_token_at
        usage = Usage(
            prompt_tokens=request.prompt_tokens,
            completion_tokens=request.num_output,
            cached_tokens=request.cached_tokens,
            preemptions=request.preemptions,
            queue_seconds=(now if request.started_at is None else request.started_at) - request.arrived_at,
            first_token_seconds=None if first is None else first - request.arrived_at,
            total_seconds=total,
            draft_tokens=request.draft_tokens,
            accepted_draft_tokens=request.accepted_draft_tokens,
        )
        self.outbox.add(request.mailbox, RequestEnded(number, usage, error))
        self.counters.requests[str(reason)] += 1
        self.counters.e2e_request_latency_seconds.observe(total)
        if self._trace.enabled:
            self._trace.mark(
                "e", "request", now, number, finish_reason=str(reason), completion_tokens=usage.completion_tokens
            )

    # Life cycle of the model

    def attach(self, scheduler: Scheduler, tokenizer: Tokenizer | None, vocab_size: int, embeds: bool) -> None:
        """Goes on with another model. Requests that do not fit it are ended."""
        self.scheduler = scheduler
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._embeds = embeds
        for request in list(self._requests.values()):
            if request.pooled is not None:  # hidden states of another model are not to be added to
                request.pooled, request.scored = None, 0
            unfinished = [branch for branch in request.branches if branch.state is not SequenceState.ENDED]
            sequences = [branch.tokens for branch in unfinished]
            if (arriving := request.arriving) is not None:
                sequences.append(arriving.tokens)
                arriving.computed = 0
                self._compute_ahead(request, arriving)
            else:
                for branch in unfinished:
                    if branch.state is SequenceState.WAITING:
                        scheduler.add(branch)
            error = self._misfit(request.new, sequences, vocab_size)
            if error is not None:
                self._end_branches(request, FinishReason.ERROR, error)
        for number, queued in list(self._queued.items()):
            error = self._misfit(queued.new, [queued.new.prompt], vocab_size)
            if error is not None:
                self._end_queued(number, error, FinishReason.ERROR)

    def _misfit(self, new: NewRequest, sequences: list[Int32], vocab_size: int) -> InvalidRequestError | None:
        assert self.scheduler is not None
        most = self.scheduler.limits.max_tokens
        if any(len(tokens) >= most for tokens in sequences):
            return InvalidRequestError(
                f"request {new.request_id}: its tokens do not fit the new model: at most {most} tokens"
            )
        if any(int(tokens.max(initial=0)) >= vocab_size for tokens in sequences):
            return InvalidRequestError(
                f"request {new.request_id}: it has token ids outside the new vocabulary of {vocab_size}"
            )
        if new.pooling is not None and not self._embeds:
            return InvalidRequestError(f"request {new.request_id}: the new model gives out no hidden states to embed")
        return None

    def detach(self) -> None:
        """Lets the model go; what remains waits for the next one."""
        if self.scheduler is not None:
            self.scheduler.preempt_all()
        self.scheduler = None

    # One step

    def begin(self, plan: Plan) -> None:
        """Notes which requests have their first step."""
        for chunk in plan.chunks:
            request = chunk.sequence.request
            if request.started_at is None:
                request.started_at = now = self._clock()
                self._waiting_new -= 1
                self.counters.request_queue_seconds.observe(now - request.arrived_at)
                self.counters.prompt_tokens += request.prompt_tokens
            if self._trace.enabled:
                self._trace.mark("n", "prefill", self._clock(), request.new.number, tokens=chunk.count)

    def commit(self, plan: Plan, drawn: StepTokens, interrupted: bool) -> None:
        """Gives each sequence its token, ends those that are complete, and writes it all to the outbox.

        Args:
            plan: The step.
            drawn: Its tokens.
            interrupted: Whether a sequence of the plan may have been ended since.
        """
        assert self.scheduler is not None
        now = self._clock()
        decodes = plan.num_decode_samples
        beyond: dict[int, _Beyond] = {}
        if drawn.finished or drawn.forced:
            beyond = {
                row: (drawn.forced.get(row, []), row in drawn.finished) for row in {*drawn.finished, *drawn.forced}
            }
        if drawn.scores:
            self._commit_scores(plan, drawn.scores)
        if len(drawn.pooled):
            self._commit_pooled(plan, drawn.pooled)
        if plan.drafts is not None:
            self._commit_drafts(plan, plan.drafts, drawn, beyond, now)
        elif decodes:
            slots, ids, logprobs, sequences = plan.decode_slots, drawn.token_ids[:decodes], drawn.logprobs, plan.decodes
            if logprobs is not None:
                logprobs = logprobs[:decodes]
            own = {row: what for row, what in beyond.items() if row < decodes} if beyond else beyond
            if interrupted:
                alive = [i for i, sequence in enumerate(sequences) if sequence.state is SequenceState.DECODE]
                sequences = [sequences[i] for i in alive]
                if sequences == self.scheduler.decodes:  # as they will be in the next step
                    sequences = self.scheduler.decodes
                slots, ids = slots[alive], ids[alive]
                own = {i: beyond[row] for i, row in enumerate(alive) if row in beyond} if beyond else beyond
                logprobs = None if logprobs is None else [logprobs[i] for i in alive]
            if sequences:
                self._commit_decodes(sequences, slots, ids, logprobs, own, now)
        at = decodes
        for chunk in plan.chunks:
            count = len(chunk.branches)
            if chunk.last and chunk.sequence.state is SequenceState.PREFILL:
                logprobs = None if drawn.logprobs is None else drawn.logprobs[at : at + count]
                own = {row - at: what for row, what in beyond.items() if at <= row < at + count}
                self._commit_prefill(chunk, drawn.token_ids[at : at + count], logprobs, own, now)
            at += count

    def _commit_scores(self, plan: Plan, scores: list[TokenLogprobs]) -> None:
        at = 0
        for chunk in plan.chunks:
            request, count = chunk.sequence.request, chunk.num_scored
            if count and not request.ended:
                self.outbox.add(request.mailbox, PromptLogprobs(request.new.number, scores[at : at + count]))
                request.scored = chunk.scored[1]
            at += count

    def _commit_pooled(self, plan: Plan, sums: Float32) -> None:
        """Adds up the hidden states, in double precision so that the pieces do not show; tells whose are complete."""
        pooling = (chunk for chunk in plan.chunks if chunk.pools)
        for chunk, part in zip(pooling, sums, strict=True):
            request = chunk.sequence.request
            if request.ended:
                continue
            request.pooled = part.astype(np.float64) + (0.0 if request.pooled is None else request.pooled)
            request.scored = chunk.pooled[1]
            if chunk.last:
                count = len(request.new.prompt) if request.new.pooling == "mean" else 1
                vector = (request.pooled / count).astype(np.float32)
                self.outbox.add(request.mailbox, Pooled(request.new.number, vector))

    def _commit_decodes(
        self,
        sequences: list[Sequence],
        slots: Int64,
        ids: Int32,
        logprobs: list[TokenLogprobs | None] | None,
        beyond: Mapping[int, _Beyond],
        now: float,
    ) -> None:
        assert self.scheduler is not None
        table = self.scheduler.slots
        table.append_tokens(slots, ids)
        gaps = now - table.last_token_at[slots]
        table.last_token_at[slots] = now
        self._observe_gaps(gaps)
        if self._rows.decodes is not sequences:
            self._rows = _derive_rows(sequences, table, slots)
        derived = self._rows
        token_ids = ids.tolist()
        self.counters.generation_tokens += len(token_ids)
        for mailbox, rows, keys in derived.keys:
            if rows is None:
                self.outbox.add(mailbox, Tokens(keys, token_ids, logprobs))
            else:
                own = None if logprobs is None else [logprobs[row] for row in rows.tolist()]
                self.outbox.add(mailbox, Tokens(keys, ids[rows].tolist(), own))
        stopped = table.stopped(slots, ids, derived.stop_ids)
        watched: dict[int, str] = {}
        for row, sequence in derived.watched:
            if not stopped[row] and (stop := self._read_text(sequence, token_ids[row])) is not None:
                watched[row] = stop
        derived.steps_left -= 1
        if derived.steps_left >= 0 and not watched and not beyond and not stopped.any():
            return
        ending = stopped | (table.num_tokens[slots] >= table.max_tokens[slots])
        if watched:
            ending[list(watched)] = True
        finished = [row for row, (tokens, complete) in beyond.items() if complete and not tokens]
        if finished:
            ending[finished] = True
        for row in np.flatnonzero(ending).tolist():
            if sequences[row].state is SequenceState.ENDED:
                continue
            stop = token_ids[row] if stopped[row] else watched.get(row)
            by_length = stop is None and row not in finished
            self._end_branch(sequences[row], FinishReason.LENGTH if by_length else FinishReason.STOP, stop)
        for row, (tokens, complete) in beyond.items():
            if tokens and sequences[row].state is not SequenceState.ENDED:
                self._jump(sequences[row], tokens, complete)

    def _commit_drafts(
        self, plan: Plan, drafts: Drafts, drawn: StepTokens, beyond: Mapping[int, _Beyond], now: float
    ) -> None:
        """As `_commit_decodes`, where a row may have several tokens: those that were drafted rightly, and one more."""
        assert self.scheduler is not None and self.scheduler.drafting is not None and drawn.taken is not None
        lengths = self.scheduler.drafting.lengths
        self._rows = _NO_ROWS  # the steps that are left are others now
        token_ids = drawn.token_ids.tolist()
        guesses = iter(drafts.token_ids.tolist())
        at = 0
        for sequence, slot, drafted, taken in zip(
            plan.decodes, plan.decode_slots.tolist(), drafts.lengths.tolist(), drawn.taken.tolist(), strict=True
        ):
            start, at = at, at + drafted + 1
            guessed = [next(guesses) for _ in range(drafted)]
            if sequence.state is not SequenceState.DECODE:  # it was ended during the step
                continue
            ids = token_ids[start : start + taken]
            if drafted:
                kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(guessed, ids, strict=False)))
                lengths.learn(slot, drafted, kept)
                self.counters.draft_tokens += drafted
                sequence.request.draft_tokens += drafted
            logprobs = None if drawn.logprobs is None else drawn.logprobs[start : start + taken]
            if ids:
                own = beyond.get(start + taken - 1, ([], False))
                self._commit_run(sequence, guessed, ids, logprobs, own, now)
            cause = drawn.failed.get(start + taken)
            if cause is not None and taken <= drafted and sequence.state is SequenceState.DECODE:
                self._drop_undrawn(sequence.request, cause)

    def _commit_run(
        self,
        sequence: Sequence,
        guessed: list[int],
        ids: list[int],
        logprobs: list[TokenLogprobs | None] | None,
        beyond: _Beyond,
        now: float,
    ) -> None:
        """Gives a branch the tokens that it has drawn in one step, as far as it does not end among them."""
        assert self.scheduler is not None
        table, request, forced = self.scheduler.slots, sequence.request, beyond[0]
        params, generated = request.new.params, int(table.num_tokens[sequence.slot]) - len(request.new.prompt)
        gap = now - float(table.last_token_at[sequence.slot])
        table.last_token_at[sequence.slot] = now
        complete = beyond[1] and not forced
        end: tuple[FinishReason, int | str | None] | None = None
        told = 0
        for taken, token_id in enumerate(ids, 1):
            generated += 1
            if taken <= len(guessed) and guessed[taken - 1] == token_id:
                request.accepted_draft_tokens += 1
                self.counters.accepted_draft_tokens += 1
            stops = token_id in params.stop_token_ids and generated > params.min_tokens
            full = self._is_full(sequence, generated)
            if stops or full or taken == len(ids) or sequence.text is not None:
                # Told before the text is read, which may end the request.
                self.scheduler.take(sequence, ids[told:taken])
                own = None if logprobs is None else logprobs[told:taken]
                self.outbox.add(request.mailbox, Tokens((sequence.key,) * (taken - told), ids[told:taken], own))
                told = taken
            if stops:
                end = (FinishReason.STOP, token_id)
            elif sequence.text is not None and (stop := self._read_text(sequence, token_id)) is not None:
                end = (FinishReason.STOP, stop)
            elif sequence.state is SequenceState.ENDED:
                break
            elif complete and taken == len(ids):
                end = (FinishReason.STOP, None)
            elif full:
                end = (FinishReason.LENGTH, None)
            if end is not None:
                break
        self.counters.generation_tokens += told
        self.counters.inter_token_latency_seconds.observe(gap / told, told)
        if end is not None:
            self._end_branch(sequence, *end)
        elif forced and sequence.state is not SequenceState.ENDED:
            self._jump(sequence, forced, beyond[1])

    def _commit_prefill(
        self,
        chunk: Chunk,
        ids: Int32,
        logprobs: list[TokenLogprobs | None] | None,
        beyond: Mapping[int, _Beyond],
        now: float,
    ) -> None:
        """A prefill is complete: its sequence goes on decoding, and so do the branches that shared it."""
        assert self.scheduler is not None
        scheduler, trunk, request = self.scheduler, chunk.sequence, chunk.sequence.request
        new = request.new
        if (arriving := request.arriving) is not None:
            scheduler.hold(trunk)
            arriving.note(new.prompt)
            self._compute_ahead(request, arriving)
            return
        if new.pin is not None:
            scheduler.tree.pin(new.pin, new.prompt[: len(new.prompt) - len(new.prompt) % scheduler.limits.page_size])
        if not chunk.branches:  # max_tokens = 0
            self._end_branches(request, FinishReason.LENGTH)
            return
        if request.first_token_at is None:
            request.first_token_at = now
            self.counters.time_to_first_token_seconds.observe(now - request.arrived_at)
            if self._trace.enabled:
                self._trace.mark("n", "first token", now, new.number)
        scheduler.begin_decoding(trunk)
        scheduler.slots.append_tokens(np.array([trunk.slot]), ids[:1])
        token_ids = ids.tolist()
        self.counters.generation_tokens += len(token_ids)
        for branch, token_id in zip(chunk.branches[1:], token_ids[1:], strict=True):
            scheduler.fork(trunk, branch, token_id)
        for branch in request.branches:
            if branch.state is SequenceState.UNBORN:  # there were not enough slots for all
                scheduler.add(branch)
        keys = tuple(branch.key for branch in chunk.branches)
        self.outbox.add(request.mailbox, Tokens(keys, token_ids, logprobs))
        for row, (branch, token_id) in enumerate(zip(chunk.branches, token_ids, strict=True)):
            if branch.state is not SequenceState.ENDED:
                self._commit_first(branch, token_id, beyond.get(row, ([], False)), now)

    def _commit_first(self, branch: Sequence, token_id: int, beyond: _Beyond, now: float) -> None:
        assert self.scheduler is not None
        params = branch.request.new.params
        if branch.resident:
            self.scheduler.slots.last_token_at[branch.slot] = now
        generated = len(self.scheduler.tokens_of(branch)) - len(branch.request.new.prompt)
        if token_id in params.stop_token_ids and generated > params.min_tokens:
            self._end_branch(branch, FinishReason.STOP, token_id)
            return
        if branch.text is not None and (stop := self._read_text(branch, token_id)) is not None:
            self._end_branch(branch, FinishReason.STOP, stop)
        elif branch.state is SequenceState.ENDED:
            return
        elif beyond[0]:
            self._jump(branch, *beyond)
        elif beyond[1]:
            self._end_branch(branch, FinishReason.STOP)
        elif self._is_full(branch, generated):
            self._end_branch(branch, FinishReason.LENGTH)

    def _is_full(self, branch: Sequence, generated: int) -> bool:
        assert self.scheduler is not None
        most, new = self.scheduler.limits.max_tokens, branch.request.new
        return generated >= new.params.max_tokens or len(new.prompt) + generated >= most

    def _jump(self, branch: Sequence, tokens: list[int], complete: bool) -> None:
        """Gives a branch tokens that it had no choice about, as far as it does not end among them.

        Jump-forward decoding is of SGLang (Zheng et al., 2024). Here a token is jumped over where it is the only one
        that the masks allow, so that the tokens are those that would have been drawn one by one.
        """
        assert self.scheduler is not None
        new = branch.request.new
        generated = len(self.scheduler.tokens_of(branch)) - len(new.prompt)
        end: tuple[FinishReason, int | str | None] | None = None
        taken = 0
        for token_id in tokens:
            taken += 1
            if token_id in new.params.stop_token_ids and generated + taken > new.params.min_tokens:
                end = (FinishReason.STOP, token_id)
            elif branch.text is not None and (stop := self._read_text(branch, token_id)) is not None:
                end = (FinishReason.STOP, stop)
            elif branch.state is SequenceState.ENDED:
                return
            elif complete and taken == len(tokens):
                end = (FinishReason.STOP, None)
            elif self._is_full(branch, generated + taken):
                end = (FinishReason.LENGTH, None)
            if end is not None:
                break
        self.scheduler.extend(branch, tokens[:taken])
        self.counters.generation_tokens += taken
        self.outbox.add(branch.request.mailbox, Tokens((branch.key,) * taken, tokens[:taken]))
        if end is not None:
            self._end_branch(branch, *end)

    def _read_text(self, branch: Sequence, token_id: int) -> str | None:
        """Feeds a token to a branch's text; returns the stop string that it completes."""
        assert branch.text is not None
        try:
            branch.text.push([token_id])
        except Exception as cause:  # the tokenizer is not ours
            error = RequestDroppedError(f"request {branch.request.new.request_id}: cannot decode {token_id}: {cause}")
            error.__cause__ = cause
            self._end_branches(branch.request, FinishReason.ERROR, error)
            return None
        return branch.text.stopped_by

    def _observe_gaps(self, gaps: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
        histogram = self.counters.inter_token_latency_seconds
        first = float(gaps[0])
        if (gaps == first).all():  # the usual case: all of them had a token in the step before
            histogram.observe(first, len(gaps))
        else:
            for gap in gaps.tolist():
                histogram.observe(gap)


def _derive_rows(sequences: list[Sequence], table: SlotTable, slots: Int64) -> _Rows:
    mailboxes: dict[Mailbox, list[int]] = {}
    for row, sequence in enumerate(sequences):
        mailboxes.setdefault(sequence.request.mailbox, []).append(row)
    whole = len(mailboxes) == 1
    return _Rows(
        decodes=sequences,
        keys=[
            (
                mailbox,
                None if whole else np.array(rows, dtype=np.int64),
                tuple(sequences[row].key for row in rows),
            )
            for mailbox, rows in mailboxes.items()
        ],
        watched=[(row, sequence) for row, sequence in enumerate(sequences) if sequence.text is not None],
        stop_ids=table.stop_columns(slots),
        steps_left=int((table.max_tokens[slots] - table.num_tokens[slots]).min()),
    )
