"""Which sequences take part in the next step, and when they get their blocks. Owned by the step thread.

Every step takes all decodes, then prefill chunks within a budget of tokens (Sarathi-Serve, Agrawal et al., 2024), so
that a long prompt never holds up sequences that run already. Sequences start in order of priority, then arrival. When
blocks run out, the newest of the least urgent sequences is preempted: its blocks are released and it waits to be
computed again, at its old place in the queue.

A step may be scheduled *ahead*, while the one before is still computed. What it needs to know of that one is known
without its tokens: `advance` notes at the launch how many tokens each sequence will have in the cache, and a sequence
that will be complete leaves the batch. `settle` notes that it was computed indeed; only then do its blocks go to the
prefix cache. Blocks and slots may be given back, and to others, while a launched step still writes to them: a device
computes launched steps in their order, so whoever gets them writes later and reads what was written last.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from asyncengine.errors import StepError
from asyncengine.step.batch import NO_PAIRS, Int32, Int64
from asyncengine.step.batches import Batches
from asyncengine.step.beam_search import Choice
from asyncengine.step.branching import Branching
from asyncengine.step.chunking import next_chunk
from asyncengine.step.drafting import Drafting, Drafts, shared
from asyncengine.step.kv_blocks import KVBlocks
from asyncengine.step.limits import Limits
from asyncengine.step.plan import Chunk, Plan
from asyncengine.step.residents import Residents
from asyncengine.step.sequence import Request, Sequence, SequenceState
from asyncengine.step.slots import SlotTable
from asyncengine.step.waiting import WaitingQueue


class Scheduler:
    """Sequences between waiting and ended.

    Args:
        limits: What the model can take.
        place: Hands a sequence's sampling parameters to the model when it gets a slot. If that raises, the sequence
            goes to `dropped` and takes no part.
        drafting: Guesses tokens of sequences that decode; None for none.
    """

    def __init__(
        self, limits: Limits, place: Callable[[Sequence, Int32], None], drafting: Drafting | None = None
    ) -> None:
        self.limits = limits
        self.slots = SlotTable(limits.max_num_sequence, limits.max_single_sequence_length, limits.page_size)
        self.blocks = KVBlocks(limits, self.slots)
        self.waiting = WaitingQueue()
        self._batches = Batches(self.slots)
        self.dropped: list[tuple[Sequence, BaseException]] = []
        self.num_preemptions = 0
        self.prefix_queries = 0  # tokens looked up
        self.prefix_hits = 0  # tokens found
        self.drafting = drafting
        self.residents = Residents(limits, self.slots, self.blocks)
        self._branching = Branching(self.slots, self.blocks, self.residents)
        self._place = place

    # What is there

    @property
    def num_running(self) -> int:
        """Sequences that take part in steps."""
        return len(self.residents)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.residents.decoding or self.residents.prefilling or len(self.waiting))

    @property
    def decodes(self) -> list[Sequence]:
        """The sequences of which the next step draws another token; the same list while they stay the same."""
        return self.residents.decodes().sequences

    def running(self) -> list[Sequence]:
        """Sequences that take part in steps."""
        return self.residents.all()

    def tokens_of(self, sequence: Sequence) -> Int32:
        """Prompt and output, wherever they are."""
        return self.slots.known_tokens(sequence.slot) if sequence.resident else sequence.tokens

    # One step

    def schedule(self, ahead: bool = False) -> Plan | None:
        """Chooses the next step and allocates its blocks; None if nothing can run.

        Args:
            ahead: Whether the step before is still computed. Then it is None, too, where its tokens must be at hand
                first: somebody is to be preempted, or what may be drawn depends on them.
        """
        if not self._grow_decodes(preempt=not ahead):
            return None
        chunks = self._continue_prefills()
        if not self._start_waiting(chunks, ahead):
            return None
        rows = self.residents.rows  # brought up to date when they were grown
        if chunks and not self.limits.hybrid:
            rows = self.residents.no_rows
        decodes, decode_slots = rows.sequences, rows.slots
        if not decodes and not chunks:
            return None
        bound = rows.bound
        if chunks:
            bound |= any(chunk.sequence.request.bound for chunk in chunks)
        if ahead and bound:
            return None
        drafts = None if self.drafting is None else self._draft(decode_slots, chunks)
        copies = self.blocks.due_copies() if self.blocks.copies else NO_PAIRS
        states = None if self.blocks.states is None else self.blocks.states.moves(rows, chunks, drafts)
        if chunks or drafts is not None:
            batch = self._batches.of(rows, chunks, copies, drafts, ahead, states)
        else:
            batch = rows.batch(copies, ahead, states)
        return Plan(batch, decodes, decode_slots, chunks, drafts, bound, rows.searching, self.residents.departures)

    def advance(self, plan: Plan) -> None:
        """Notes that a step was launched: its keys and values will be in the cache of whatever comes after it."""
        if plan.decodes:
            assert plan.decodes is self.residents.rows.sequences, "the plan is an old one"
            self.residents.rows.advance()
        for chunk in plan.chunks:
            if chunk.sequence.resident:
                self.slots.num_computed[chunk.sequence.slot] += chunk.count
                chunk.sequence.in_flight += chunk.count

    def settle(self, plan: Plan, taken: Int64 | None = None) -> None:
        """Notes that a step's keys and values are in the cache indeed; of drafts see `take`.

        Args:
            plan: The step.
            taken: As `StepTokens.taken`.
        """
        rows = self.residents.rows
        if plan.decodes and plan.decodes is rows.sequences:
            rows.in_flight -= 1
        if self.blocks.states is not None and taken is not None:
            self.blocks.states.settle(plan.decodes, taken)
        for chunk in plan.chunks:
            if chunk.sequence.resident:
                chunk.sequence.in_flight -= chunk.count
                self.blocks.publish(chunk.sequence, keep=True)
        if self.drafting is not None and plan.chunks:
            going_on = (chunk.sequence for chunk in plan.chunks if chunk.sequence.request.new.params.max_tokens > 0)
            filled = [sequence.slot for sequence in going_on if sequence.resident]
            self.drafting.follow(self.slots, np.array(filled, dtype=np.int64))

    def take(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Gives a decoding sequence tokens of which all but the last were drafted, so that their keys and values are
        in the cache. Those of drafts that were not taken are written over; until then nobody looks at them.
        """
        slot, slots = sequence.slot, self.slots
        have = int(slots.num_tokens[slot])
        slots.tokens[slot, have : have + len(token_ids)] = token_ids
        slots.num_tokens[slot] = have + len(token_ids)
        slots.num_computed[slot] = have + len(token_ids) - 1
        self.residents.look_again()

    def fork(self, trunk: Sequence, branch: Sequence, token_id: int) -> None:
        """Lets an unborn branch begin with its first token, on the prompt's blocks that `trunk` computed.

        Without a block to be had, the branch waits and is computed from its tokens.
        """
        if not self._branching.fork(trunk, branch, token_id):
            self.residents.release_slot(branch)
            self._wait(branch)

    def branch_out(self, request: Request, choices: list[Choice]) -> list[int] | None:
        """Lets the beams of a search go on with the tokens that were chosen, see `Branching.branch_out`.

        Returns:
            Which beam each choice has become; None if there were no blocks, and the request begins anew later, or is
            dropped.
        """
        beams = request.branches
        became = self._branching.branch_out(beams, choices)
        if became is None:
            self._make_way(beams[0])
        elif request.new.params.remembers:
            self._place_again([beams[at] for at in became])
        return became

    def _place_again(self, beams: list[Sequence]) -> None:
        """Hands parameters to the model for beams whose tokens are not those that were drawn for their slots."""
        for beam in beams:
            try:
                self._place(beam, self.tokens_of(beam))
            except BaseException as error:  # as at its start
                self.dropped.append((beam, error))
                break  # the others go with it

    def extend(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Gives a sequence further tokens that were not drawn; one that decodes computes them as a piece of prefill.

        Without blocks to be had it is preempted.
        """
        tokens = np.array(token_ids, dtype=np.int32)
        if not sequence.resident:
            sequence.tokens = np.concatenate([sequence.tokens, tokens])
            sequence.num_output += len(tokens)
            return
        slot, slots = sequence.slot, self.slots
        have = int(slots.num_tokens[slot])
        slots.tokens[slot, have : have + len(tokens)] = tokens
        slots.num_tokens[slot] = have + len(tokens)
        need = -(-int(slots.num_tokens[slot]) // self.limits.page_size) - int(slots.num_blocks[slot])
        if need > 0:
            if not self.blocks.make_room(need):
                self.preempt(sequence)
                return
            self.blocks.give(slot, need)
        self.residents.prefill_again(sequence)

    # Entering and leaving

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the waiting queue."""
        self._wait(sequence)

    def end(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees what it holds; what it computed goes to the prefix cache."""
        if sequence.state is SequenceState.WAITING:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
        elif sequence.resident:
            self.blocks.publish(sequence, keep=False)
            self.residents.leave(sequence)
            sequence.num_output = int(self.slots.num_tokens[sequence.slot]) - len(sequence.request.new.prompt)
        self.residents.release_slot(sequence)
        sequence.state = SequenceState.ENDED

    def preempt(self, sequence: Sequence) -> None:
        """Takes blocks and slot from a sequence and lets it wait; what it computed goes to the prefix cache.

        No step with it may be under way, or else its token must not be committed any more. Of a search all beams go,
        and it begins anew: nobody has heard of them, and they would not share their blocks any more.
        """
        if sequence.request.search is not None:
            self._begin_anew(sequence.request)
            return
        self.blocks.publish(sequence, keep=False)
        self.residents.leave(sequence)
        sequence.tokens = self.slots.known_tokens(sequence.slot).copy()
        sequence.num_output = len(sequence.tokens) - len(sequence.request.new.prompt)
        if self.drafting is not None:
            sequence.learnt = self.drafting.lengths.learnt(sequence.slot)
        self.residents.release_slot(sequence)
        self.residents.release_unborn(sequence)
        sequence.request.preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)

    def _begin_anew(self, request: Request) -> None:
        assert request.search is not None
        for beam in request.branches:
            if beam.resident:
                self.blocks.publish(beam, keep=False)
                self.residents.leave(beam)
            self.residents.release_slot(beam)
            beam.state, beam.tokens, beam.num_output = SequenceState.UNBORN, request.new.prompt, 0
        request.search.begin()
        request.preemptions += 1
        self.num_preemptions += 1
        self._wait(request.branches[0])

    def hold(self, sequence: Sequence) -> None:
        """Takes a sequence out of the steps until more of its prompt comes; the prefix cache has what it computed."""
        self.blocks.publish(sequence, keep=False)
        self.residents.leave(sequence)
        self.residents.release_slot(sequence)
        sequence.state = SequenceState.HELD

    def preempt_all(self) -> None:
        """Lets every sequence wait, as after the model or its cache has changed."""
        for sequence in self.running():
            if sequence.resident:  # not with another beam of its search
                self.preempt(sequence)

    def check(self) -> None:
        """Compares all accounts with each other.

        Raises:
            AssertionError: They disagree.
        """
        self.blocks.check()
        if not self.running():
            self.blocks.check_idle()

    # How

    def _grow_decodes(self, preempt: bool) -> bool:
        """Gives each decoding sequence a block for its next token, preempting the newest where there is none.

        Returns:
            False where that would have been needed and is not allowed.
        """
        while (rows := self.residents.decodes()).sequences and not rows.placed:
            lacking = rows.lacking()
            if self.blocks.make_room(len(lacking)):
                if len(lacking):
                    self.blocks.give_each(lacking)
                return True
            if not preempt:
                return False
            if not self._make_way(max(self.running(), key=lambda sequence: sequence.order)):
                return False
        return True

    def _make_way(self, sequence: Sequence) -> bool:
        """Preempts a sequence for want of blocks; False if it is dropped.

        That is a search that runs alone, and would come no further when it begins anew: others are pinned blocks.
        """
        pool, request = self.blocks.pool, sequence.request
        if request.search is None or any(other.request is not request for other in self.running()):
            self.preempt(sequence)
            return True
        error = StepError(
            f"request {request.new.request_id}: its {len(request.branches)} beams need more than the "
            f"{pool.num_blocks - self.blocks.tree.num_pinned} of {pool.num_blocks} blocks that are not pinned"
        )
        self.dropped.append((sequence, error))
        return False

    def _continue_prefills(self) -> list[Chunk]:
        budget = self.limits.prefill_chunk_size
        chunks: list[Chunk] = []
        for sequence in self.residents.prefilling:
            if budget <= 0:
                break
            budget -= self._add_chunk(chunks, sequence, budget)
        return chunks

    def _start_waiting(self, chunks: list[Chunk], ahead: bool) -> bool:
        """Starts whoever waits, as far as there is room; False if one can start, but not ahead."""
        budget = self.limits.prefill_chunk_size
        if chunks:
            budget -= sum(chunk.count for chunk in chunks)
        while budget > 0 and self.slots.num_free and (sequence := self.waiting.head()) is not None:
            if ahead and sequence.request.bound:
                return not (self._has_slots(sequence) and self.blocks.fit(sequence, self._spare(sequence)))
            if not self._start(sequence):
                break
            if sequence.state is SequenceState.PREFILL:
                budget -= self._add_chunk(chunks, sequence, budget)
        return True

    def _add_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        """Adds the sequence's next chunk, if it gets one; returns its tokens."""
        slot, slots = sequence.slot, self.slots
        computed, known = int(slots.num_computed[slot]), int(slots.num_tokens[slot])
        chunk = next_chunk(sequence, computed, known, budget, chunks, self.limits)
        if chunk is None:
            return 0
        chunks.append(chunk)
        return chunk.count

    def _start(self, sequence: Sequence) -> bool:
        """Gives the head of the queue a slot and all blocks of its prefill; False if there are not enough."""
        tokens = sequence.tokens
        if not self._has_slots(sequence):
            return False
        held = self.blocks.hold(sequence, self._spare(sequence))
        if held is None:
            return False
        self.waiting.remove(sequence)
        self.residents.fill(sequence, self.slots.take())
        computed = self.blocks.begin(sequence, held)
        self.residents.prefill(sequence)
        request = sequence.request
        found = max(computed - request.computed_ahead, 0)
        self.prefix_queries += len(tokens) - request.computed_ahead
        self.prefix_hits += found
        if request.preemptions == 0 and sequence.branch == 0:
            media = request.new.media
            request.cached_tokens += found if media is None else media.meant(found)
        unborn = [b for b in request.branches if b.state is SequenceState.UNBORN and request.arriving is None]
        for branch in unborn[: self.slots.num_free]:
            branch.slot = self.slots.take()
        for placed in (sequence, *unborn):
            if placed.slot < 0:
                continue
            try:
                self._place(placed, tokens)
            except BaseException as error:  # of a grammar, say: it must not end the thread
                self.dropped.append((sequence, error))
                self.residents.leave(sequence)
                self.residents.release_unborn(sequence)
                self.residents.release_slot(sequence)
                sequence.state = SequenceState.WAITING  # in no queue; the core ends it
                break
        return True

    def _has_slots(self, sequence: Sequence) -> bool:
        """Whether there is a slot for a sequence, and of a search for each of its beams."""
        return self.slots.num_free >= (1 if sequence.request.search is None else len(sequence.request.branches))

    def _spare(self, sequence: Sequence) -> int:
        """How many blocks must be free beside those of a sequence that starts.

        Those that run already will need blocks soon, and the beams of a search will each have one of their own:
        starting one more must not preempt it or them at once.
        """
        return self.num_running + (0 if sequence.request.search is None else len(sequence.request.branches) - 1)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self.waiting.push(sequence)

    def _draft(self, rows: Int64, chunks: list[Chunk]) -> Drafts | None:
        """Guesses for the rows that decode, as far as there are blocks for them without preempting anyone."""
        drafting, slots, page_size = self.drafting, self.slots, self.limits.page_size
        assert drafting is not None
        if self.blocks.copies:
            drafting.copy(self.blocks.resident_copies())
        if not len(rows) or drafting.failure is not None:
            return None
        prefill = sum(chunk.count for chunk in chunks)
        lengths = drafting.lengths.wanted(rows, len(rows) + prefill)
        lengths[slots.searching[rows]] = 0
        lengths = np.minimum(lengths, slots.max_tokens[rows] - slots.num_tokens[rows] - 1)  # one is drawn at the end
        lengths[np.cumsum(lengths) > self.limits.prefill_chunk_size - prefill] = 0
        if self.limits.kept_states is not None:
            lengths = shared(lengths, self.limits.drafted_states)
        have = slots.num_blocks[rows] * page_size - slots.num_computed[rows] - 1
        for row in np.flatnonzero(lengths > have).tolist():
            need = -(-int(lengths[row] - have[row]) // page_size)
            if self.blocks.make_room(need, spare=self.num_running):
                self.blocks.give(int(rows[row]), need)
            else:
                lengths[row] = have[row]
        return drafting.propose(slots, rows, lengths)
